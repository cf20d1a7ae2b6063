"""Texts of an engine with a model are those of `Generator`; nothing compiles while it runs."""

import dataclasses
import random
import types

import jax
import jax.numpy as jnp
import pytest
from engine_readers import Reader
from tiny_model import DEPTH, TINY, Pieces, make

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.sampling import CacheConfig
from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.serving.engine import Engine
from megatransformer_jax.serving.requests import Job, NewToken

PIECES = Pieces()
ROWS, CAPACITY, SLOTS = 4, 80, 8
SAMPLES = 3
# Few kinds, as each is programs more for `Generator`. A token below 1e-9 never leaves early.
KINDS = (
    {"strategy": "greedy", "exit_threshold": 0.3},
    {"strategy": "greedy", "exit_threshold": 1e-9},
    {
        "strategy": "sample",
        "exit_threshold": 0.2,
        "top_k": 8,
        "temperature": 1.3,
        "stop": ("ab", "c\n"),
    },
)


@pytest.fixture(scope="module")
def engine():
    model, params = make(TINY)
    lm = types.SimpleNamespace(
        config=TINY, tokenizer=PIECES, trained_depth=DEPTH, module=model, weights=params
    )
    config = ServingConfig(
        name="tiny",
        rows=ROWS,
        capacity=CAPACITY,
        chunk=8,
        short_chunks=(3,),
        criteria=("fixed", "latent_diff"),
        max_depth=SLOTS,
        cache_slots=SLOTS,
        queue=256,
    )
    with Engine(lm, config) as engine:
        yield engine


def ids(rng, count):
    return tuple(rng.randrange(3, PIECES.vocab_size) for _ in range(count))


def random_jobs(rng, count, most=20):
    """Every third begins like the one before, and is read by the same rule."""
    jobs, kind, depth = [], KINDS[0], SLOTS
    for number in range(count):
        if number % 3 == 1:
            prompt = (*jobs[-1].ids, *ids(rng, 4))
        else:
            prompt = (1, *ids(rng, rng.randint(16, 27)))  # All padded alike by `Generator`.
            kind, depth = rng.choice(KINDS), rng.choice((1, 3, SLOTS))
        own = {"seed": rng.randrange(9)} if kind["strategy"] == "sample" else {}
        most_new = rng.randint(1, most)
        config = GenerationConfig.of(
            depth=depth,
            exit_criterion="latent_diff",
            max_new_tokens=most_new,
            **kind,
            **own,
        )
        # The last ones come together, and several of their tokens at once.
        jobs.append(Job(prompt, config, num_top=3, is_streamed=number < count // 2))
    return jobs


def generated(job):
    """What `Generator` makes of a job: one text, or all samples of its prompt."""
    model, params = make(TINY)
    count = SAMPLES if job.config.strategy == "sample" else 1
    cache = CacheConfig(capacity=CAPACITY)
    config = dataclasses.replace(job.config, num_samples=count, cache=cache)
    return Generator(model, params, PIECES, config, DEPTH).generate([job.ids])


def assert_is(reader, number, wanted):
    """The text of a ticket is a `Completion`."""
    events = reader.events[number]
    new = [event for event in events if isinstance(event, NewToken)]
    assert tuple(event.scored.token for event in new) == wanted.token_ids
    assert tuple(event.depth for event in new) == wanted.depths
    assert (reader.text(number), reader.reason(number)) == (wanted.text, wanted.finish_reason)
    ends = [events[-1].end_token] if events[-1].end_token else []
    score = sum(scored.log_prob for scored in [*(event.scored for event in new), *ends])
    assert score == pytest.approx(wanted.score, abs=1e-4)
    for event in new:
        if event.scored.token == event.scored.top[0][0]:
            assert event.scored.log_prob == pytest.approx(event.scored.top[0][1], abs=1e-5)


def value(engine, name):
    """Of a metric, by its name without prefix."""
    start = f'megatransformer:{name}{{model_name="tiny"}} '
    lines = engine.metrics.text().decode().splitlines()
    return float(next(line for line in lines if line.startswith(start)).removeprefix(start))


def test_texts_that_share_a_batch_are_those_of_generator(engine):
    jobs = random_jobs(random.Random(0), 24)
    readers = [Reader() for _ in jobs]
    for job, reader in zip(jobs, readers, strict=True):
        engine.submit([job], reader)
    for job, reader in zip(jobs, readers, strict=True):
        assert_is(reader.wait(), 0, generated(job)[0])
    assert value(engine, "prompt_tokens_reused_total") > 0


def test_siblings_are_the_samples_of_one_prompt(engine):
    options = {"exit_criterion": "latent_diff", "depth": 3, "max_new_tokens": 12, "seed": 5}
    config = GenerationConfig.of(**options, **KINDS[2])
    jobs = [
        Job((1, *ids(random.Random(1), 20)), config, sample=number) for number in range(SAMPLES)
    ]
    reader = Reader(SAMPLES)
    engine.submit([dataclasses.replace(job, num_top=1) for job in jobs], reader)
    wanted = generated(jobs[0])
    reader.wait()
    for number in range(SAMPLES):
        assert_is(reader, number, wanted[number])
    assert [reader.events[number][0].num_reused for number in range(SAMPLES)] == [0, 20, 20]
    assert len({completion.token_ids for completion in wanted}) == SAMPLES


def test_nothing_compiles_in_200_random_requests(engine):
    rng = random.Random(2)
    readers = []
    for job in random_jobs(rng, 200, most=4):
        readers.append(Reader())
        changes = {
            "logit_bias": {rng.randrange(3, 20): rng.uniform(-5, 5)},
            "scores_prompt": rng.random() < 0.2,
            "min_new_tokens": rng.randint(0, 1),
            "num_top": rng.randint(0, 20),
        }
        ticket = engine.submit([dataclasses.replace(job, **changes)], readers[-1])
        if rng.random() < 0.05:
            ticket.cancel()
    for reader in readers:
        reader.wait()
    assert value(engine, "compilations_total") == 0
    # Something that is compiled would have been seen.
    engine.run(lambda: jax.jit(lambda x: x * 3 + 1)(jnp.ones(3))).result(60)
    assert value(engine, "compilations_total") > 0
