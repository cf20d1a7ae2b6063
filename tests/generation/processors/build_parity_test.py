"""Every processor that Hugging Face has gives the same scores as theirs, row by row."""

import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from example_rows import (
    KINDS,
    NUM_ROWS,
    VOCAB_SIZE,
    random_history,
    random_logits,
    row_tokens,
)
from transformers import GenerationConfig as TheirConfig
from transformers import GenerationMixin
from transformers.generation import logits_process as theirs

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.sampling import SamplingConfig
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.generation.history import History, history_of_prompts
from megatransformer_jax.generation.processors.build import build_chain
from megatransformer_jax.generation.processors.cuts import MinP, Temperature, TopK, TopP, Typical
from megatransformer_jax.generation.processors.penalties import (
    MinNewTokens,
    NoRepeatNgram,
    RepetitionPenalty,
)
from megatransformer_jax.generation.processors.processor import (
    AllowedTokens,
    Processor,
    apply_chain,
    init_chain,
    update_chain,
)

EOS = 2
Pair = tuple[Processor, list]


def f32(values: np.ndarray) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def temperature(rng: np.random.Generator, history: History) -> Pair:
    values = rng.uniform(0.1, 3, NUM_ROWS)
    return Temperature(f32(values)), [theirs.TemperatureLogitsWarper(v) for v in values.tolist()]


def top_k(rng: np.random.Generator, history: History) -> Pair:
    values = rng.integers(1, VOCAB_SIZE + 9, NUM_ROWS)
    ours = TopK(jnp.asarray(values, jnp.int32))
    return ours, [theirs.TopKLogitsWarper(value) for value in values.tolist()]


def top_p(rng: np.random.Generator, history: History) -> Pair:
    values = rng.uniform(0.01, 0.99, NUM_ROWS)
    return TopP(f32(values)), [theirs.TopPLogitsWarper(value) for value in values.tolist()]


def min_p(rng: np.random.Generator, history: History) -> Pair:
    values = rng.uniform(0, 0.99, NUM_ROWS) * (rng.random(NUM_ROWS) < 0.8)
    return MinP(f32(values)), [theirs.MinPLogitsWarper(value) for value in values.tolist()]


def typical(rng: np.random.Generator, history: History) -> Pair:
    values = rng.uniform(0.01, 0.99, NUM_ROWS)
    return Typical(f32(values)), [theirs.TypicalLogitsWarper(value) for value in values.tolist()]


def repetition_penalty(rng: np.random.Generator, history: History) -> Pair:
    values = rng.uniform(0.3, 3, NUM_ROWS)
    return RepetitionPenalty(f32(values), VOCAB_SIZE), [
        theirs.RepetitionPenaltyLogitsProcessor(value) for value in values.tolist()
    ]


def no_repeat_ngram(rng: np.random.Generator, history: History) -> Pair:
    values = rng.integers(1, 5, NUM_ROWS)
    return NoRepeatNgram(jnp.asarray(values, jnp.int32), 4), [
        theirs.NoRepeatNGramLogitsProcessor(value) for value in values.tolist()
    ]


def min_new_tokens(rng: np.random.Generator, history: History) -> Pair:
    values = rng.integers(0, 9, NUM_ROWS)
    prompts = np.asarray(history.prompt_lengths).tolist()
    return MinNewTokens(jnp.asarray(values, jnp.int32), jnp.int32(EOS)), [
        theirs.MinNewTokensLengthLogitsProcessor(prompt, value, EOS)
        for prompt, value in zip(prompts, values.tolist(), strict=True)
    ]


def allowed(rng: np.random.Generator, history: History) -> Pair:
    is_allowed = rng.random((NUM_ROWS, VOCAB_SIZE)) < 0.6
    is_allowed[:, 5] = True
    return AllowedTokens(jnp.asarray(is_allowed)), [
        theirs.SuppressTokensLogitsProcessor(np.flatnonzero(~row).tolist()) for row in is_allowed
    ]


MAKERS = [
    temperature,
    top_k,
    top_p,
    min_p,
    typical,
    repetition_penalty,
    no_repeat_ngram,
    min_new_tokens,
    allowed,
]


@jax.jit
def process(processor: Processor, history: History, logits: jax.Array) -> jax.Array:
    return processor(processor.init(history), history, logits)


def expect_same(ours: np.ndarray, their: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(their))
    np.testing.assert_allclose(ours, their, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKERS)
def test_scores_are_those_of_transformers(
    make: Callable[[np.random.Generator, History], Pair], kind: str
):
    rng = np.random.default_rng(KINDS.index(kind))
    num_banned = 0
    for _ in range(8):
        history = random_history(rng, num_kinds=6)
        logits = random_logits(rng, kind)
        processor, per_row = make(rng, history)
        ours = np.array(process(processor, history, logits))
        num_banned += np.sum(np.isneginf(ours))
        for row, their in enumerate(per_row):
            scores = torch.tensor(np.asarray(logits)[row : row + 1])
            expected = their(torch.tensor([row_tokens(history, row)]), scores)
            expected = expected.numpy()[0]
            if make is top_p:  # which of equal scores they keep depends on the size of the row
                ours[row], expected = np.sort(ours[row]), np.sort(expected)
            expect_same(ours[row], expected)
    keeps_equal_ones = kind == "flat" and make in (top_k, min_p, typical)
    assert num_banned or keeps_equal_ones or make in (temperature, repetition_penalty)


class NoModel(GenerationMixin):
    """As much of a model as their order of processors needs."""

    config = types.SimpleNamespace(is_encoder_decoder=False)


def test_the_chain_has_the_order_of_generate():
    """Token by token along a text: the whole chain against the list that `generate` makes."""
    options = {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.85, "temperature": 1.4}
    config = GenerationConfig(
        sampling=SamplingConfig(**options, repetition_penalty=1.3, no_repeat_ngram=2)
    )
    their_config = TheirConfig(
        **options,
        do_sample=True,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        suppress_tokens=[0, *range(259, 270)],
    )
    tokenizer = BytesTokenizer()
    chain = build_chain(config, tokenizer, vocab_size=270)
    their_config._eos_token_tensor = torch.tensor([tokenizer.eos_id])
    prompt = [1, *tokenizer.encode("abab")]
    their_chain = NoModel()._get_logits_processor(their_config, input_ids_seq_length=len(prompt))
    assert len(their_chain) == len(chain)

    rng = np.random.default_rng(5)
    history = history_of_prompts([prompt], 40, tokenizer.pad_id)
    states = init_chain(chain, history)
    step = jax.jit(apply_chain)
    for _ in range(20):
        logits = rng.normal(0, 2, (1, 270)).astype(np.float32)
        logits[:, 100:104] += 8  # what repeats
        ours = step(chain, states, history, jnp.asarray(logits))
        expected = their_chain(torch.tensor([row_tokens(history, 0)]), torch.tensor(logits))
        expect_same(np.asarray(ours), expected.numpy())
        token = jnp.argmax(ours, axis=-1)
        history = history.append(token)
        states = update_chain(chain, states, history, token)
