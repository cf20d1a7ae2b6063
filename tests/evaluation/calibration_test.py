"""Thresholds that keep the accuracy: what is tried, against decoding by another path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny

from megatransformer_jax.evaluation.answers import cached_answers
from megatransformer_jax.evaluation.calibration import (
    ExitScores,
    Search,
    find_first,
    pass_with_exits,
    watch_criteria,
)
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import Batch, DTypePolicy

DEPTH, ROWS, LENGTH = 6, 3, 6
NAMES = ("latent_diff", "entropy", "argmax_stability")
CONFIG = tiny(prelude_layers=0, coda_layers=0)
KEYS = jax.vmap(jax.random.key)(jnp.arange(ROWS))


@functools.cache
def model_and_params():
    model = build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")
    return model, init_params(model, jax.random.key(0))


def make_batch(only_last: bool) -> Batch:
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, CONFIG.vocab_size)
    mask = jnp.ones((ROWS, LENGTH)).at[:, :-1].set(0.0 if only_last else 1.0)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    return Batch(tokens, jnp.roll(tokens, -1, 1), mask, jnp.ones_like(tokens), positions)


def decoded(batch, name, threshold):
    model, params = model_and_params()
    names = ("fixed", *NAMES)
    given = KEYS, jnp.int32(names.index(name)), jnp.float32(threshold)
    return pass_with_exits(model, params, batch, *given, names=names, depth=DEPTH)


def watched(batch):
    model, params = model_and_params()
    seen = watch_criteria(model, params, batch, jax.random.key(0), names=NAMES, depth=DEPTH)
    return [np.asarray(array) for array in seen]


def test_tokens_exit_as_they_do_in_decoding_with_one_criterion():
    model, params = model_and_params()
    batch = make_batch(only_last=False)
    values = watched(batch)[0][:, NAMES.index("latent_diff")]
    # From zero, the first iteration is 1 away.
    threshold = float(np.quantile(values[values < 0.99], 0.8))
    shape = CacheShape(ROWS, LENGTH, DEPTH, dtype=jnp.dtype("float32"), platform="cpu")
    rule = DepthRule(
        jnp.int32(DEPTH), jnp.float32(threshold), jnp.int32(1), exit_criterion("latent_diff")
    )
    wanted = cached_answers(model, params, batch, init_cache(CONFIG, shape), rule, KEYS)
    found = decoded(batch, "latent_diff", threshold)
    np.testing.assert_array_equal(found.num_steps, wanted.num_steps)
    np.testing.assert_array_equal(found.predictions, wanted.predictions)
    assert len(np.unique(found.num_steps)) > 1


def test_prompts_wait_for_criteria_of_logits_so_that_a_whole_pass_tells_what_answers_do():
    batch = make_batch(only_last=True)
    values, said = watched(batch)
    entropies = values[:, NAMES.index("entropy"), :, -1]
    threshold = float(np.median(entropies))
    settled = entropies < threshold
    settled[-1] = True
    first = settled.argmax(axis=0)
    answers = decoded(batch, "entropy", threshold)
    np.testing.assert_array_equal(answers.num_steps[:, -1], first + 1)
    np.testing.assert_array_equal(answers.predictions[:, -1], said[first, np.arange(ROWS), -1])
    assert np.all(np.asarray(answers.num_steps)[:, :-1] == DEPTH)
    # A criterion of the state lets tokens of the prompt leave.
    assert np.any(np.asarray(decoded(batch, "latent_diff", 0.9).num_steps)[:, :-1] < DEPTH)


def test_found_thresholds_keep_what_was_asked_and_looser_ones_do_not():
    model, params = model_and_params()
    batch = make_batch(only_last=False)
    search = Search(
        model, params, [batch], DEPTH, jax.random.key(0), has_answers=False, names=NAMES
    )
    assert search.full == ExitScores(1.0, float(DEPTH))
    for name in NAMES:
        exits = search.find(name, 0.9)
        if exits.scores is None:
            continue
        assert exits.scores.accuracy >= 0.9 and exits.scores.mean_steps <= DEPTH
        candidates = search._candidates(name)
        place = candidates.index(exits.threshold)
        if place:
            looser = search._judge.score(*search._decode(name, candidates[place - 1]))
            assert looser.accuracy < 0.9
    assert search.find("latent_diff", 0.9).scores is not None


@pytest.mark.parametrize("size", [0, 1, 2, 7, 20])
def test_the_first_that_passes_is_found_wherever_it_begins(size):
    for first in range(size + 1):
        for start in range(size):
            tried = []

            def score(candidate, tried=tried):
                tried.append(candidate)
                return ExitScores(candidate, 1.0)

            found = find_first(
                [float(number) for number in range(size)],
                score,
                lambda scores, first=first: scores.accuracy >= first,
                start,
            )
            assert (None if found is None else found[0]) == (first if first < size else None)
            assert len(tried) == len(set(tried)) <= 2 * max(size, 1).bit_length() + 1
    assert find_first([], lambda _: ExitScores(1.0, 1.0), lambda _: True, 0) is None
