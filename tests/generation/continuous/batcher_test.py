"""What a row gives is what `Generator` gives for its text alone, whatever shares the batch."""

import functools
import random

import pytest
from driven_batcher import drive
from tiny_generator import generator
from tiny_model import PLAIN, TINY, make, tiny

from megatransformer_jax.config.sampling import CacheConfig, DepthConfig, SamplingConfig
from megatransformer_jax.generation.continuous.batcher import Batcher
from megatransformer_jax.generation.continuous.lanes import BatchShape, RowText

DIAGONAL = tiny(
    recurrence={"adapter": "diagonal", "state_init": "normal"},
    attention={"window": 5, "num_kv_heads": 2},
    value_embedding={"layers": (0, 1), "gate_channels": 4},
)
# As Ouro: nothing is injected, the state begins as the prelude's output, iterations differ.
LOOPED = tiny(
    prelude_layers=0,
    coda_layers=0,
    core_layers=2,
    recurrence={
        "adapter": "none",
        "state_init": "none",
        "backprop_depth": 8,
        "loop_embedding": True,
        "loop_scale": True,
        "loop_lora_rank": 2,
    },
)
CRITERIA = {"fixed": None, "latent_diff": (0.15, 0.6), "kl": (0.005, 0.1)}
SHAPE = BatchShape(4, 64, 8, chunk=4, criteria=("latent_diff", "kl"), num_top=2)
# Ends texts that draw it; the second never comes.
END_IDS = (11, 30)


@functools.cache
def batcher(config, shape=SHAPE):
    return Batcher(*make(config), None, shape)


def some_texts(count, kinds, seed=0):
    """Texts of random prompts, depths, thresholds, settings and lengths.

    Args:
      count: how many.
      kinds: criterion, whether tokens are drawn, whether states go on; each in turn.
    """
    chance = random.Random(seed)
    texts = []
    for number in range(count):
        criterion, is_drawn, is_warm = kinds[number % len(kinds)]
        limits = CRITERIA[criterion]
        sampling = SamplingConfig(
            temperature=chance.choice((0.7, 1.0, 1.6)),
            top_k=chance.choice((3, 20)),
            top_p=chance.choice((0.6, 0.95)),
            repetition_penalty=1.3,
        )
        texts.append(
            RowText(
                [1, *(chance.randrange(3, 30) for _ in range(chance.randrange(11)))],
                chance.randrange(1, 9),
                depth=chance.randrange(3, 9),
                min_depth=1 if limits is None else chance.randrange(1, 4),
                criterion=criterion,
                threshold=0.0 if limits is None else chance.uniform(*limits),
                warm_start=is_warm,
                is_drawn=is_drawn,
                sampling=sampling,
                seed=chance.randrange(9),
                end_ids=END_IDS,
            )
        )
    return texts


def alone(config, text, cache=None):
    """What `Generator` gives for the text."""
    depth = DepthConfig()
    if config.is_recurrent:
        depth = DepthConfig(
            depth=text.depth,
            min_depth=text.min_depth,
            exit_criterion=text.criterion,
            exit_threshold=None if text.criterion == "fixed" else text.threshold,
            warm_start=text.warm_start,
        )
    sampling = text.sampling
    if not text.is_drawn:
        sampling = SamplingConfig(repetition_penalty=sampling.repetition_penalty)
    one = generator(
        config,
        tokenizer=None,
        end_ids=END_IDS,
        strategy="sample" if text.is_drawn else "greedy",
        sampling=sampling,
        depth=depth,
        cache=CacheConfig(capacity=64) if cache is None else cache,
        seed=text.seed,
        max_new_tokens=text.max_new_tokens,
    )
    return one.generate([text.ids])[0]


def assert_equal(got, wanted):
    assert got.token_ids == list(wanted.token_ids)
    assert got.depths == list(wanted.depths)
    assert got.finish_reason == wanted.finish_reason
    assert got.score == pytest.approx(wanted.score, abs=1e-4)


# Each compiles a generator.
OF_LINEAR = (("fixed", False, False), ("latent_diff", True, True), ("kl", True, False))
DRAWN = (("latent_diff", True, False),)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [(TINY, OF_LINEAR), (DIAGONAL, DRAWN), (LOOPED, DRAWN), (PLAIN, (("fixed", True, False),))],
    ids=["linear", "diagonal", "looped", "plain"],
)
def test_rows_equal_texts_alone(config, kinds):
    texts = some_texts(24, kinds)
    got = drive(batcher(config), texts, arrival=1)
    for text, one in zip(texts, got, strict=True):
        assert_equal(one, alone(config, text))
