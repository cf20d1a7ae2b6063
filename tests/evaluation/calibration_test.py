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

DEPTH, ROWS, LENGTH = 4, 3, 6
NAMES = ("latent_diff", "entropy", "argmax_stability")
CONFIG = tiny(prelude_layers=0, coda_layers=0)
KEYS = jax.vmap(jax.random.key)(jnp.arange(ROWS))


@functools.cache
def model_and_params():
    model = build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    # Larger than fresh ones, so that iterations say different things.
    return model, jax.tree.map(lambda leaf: 2 * leaf, params)


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


def test_tokens_exit_as_they_do_in_decoding_with_one_criterion():
    model, params = model_and_params()
    batch = make_batch(only_last=False)
    shape = CacheShape(ROWS, LENGTH, DEPTH, dtype=jnp.dtype("float32"), platform="cpu")
    rule = DepthRule(
        jnp.int32(DEPTH), jnp.float32(0.3), jnp.int32(1), exit_criterion("latent_diff")
    )
    wanted = cached_answers(model, params, batch, init_cache(CONFIG, shape), rule, KEYS)
    found = decoded(batch, "latent_diff", 0.3)
    np.testing.assert_array_equal(found.num_steps, wanted.num_steps)
    np.testing.assert_array_equal(found.predictions, wanted.predictions)
    assert len(np.unique(found.num_steps)) > 1


def test_prompts_wait_for_criteria_of_logits_so_that_a_whole_pass_tells_what_answers_do():
    model, params = model_and_params()
    batch = make_batch(only_last=True)
    values, said = watch_criteria(model, params, batch, jax.random.key(0), names=NAMES, depth=DEPTH)
    entropies = np.asarray(values)[:, NAMES.index("entropy"), :, -1]
    threshold = float(np.median(entropies))
    settled = entropies < threshold
    settled[-1] = True
    first = settled.argmax(axis=0)
    answers = decoded(batch, "entropy", threshold)
    np.testing.assert_array_equal(answers.num_steps[:, -1], first + 1)
    np.testing.assert_array_equal(
        answers.predictions[:, -1], np.asarray(said)[first, np.arange(ROWS), -1]
    )
    assert np.all(np.asarray(answers.num_steps)[:, :-1] == DEPTH)
    # A criterion of the state lets tokens of the prompt leave.
    assert np.any(np.asarray(decoded(batch, "latent_diff", 0.9).num_steps)[:, :-1] < DEPTH)


def test_found_thresholds_keep_what_was_asked_and_looser_ones_do_not():
    model, params = model_and_params()
    batch = make_batch(only_last=False)
    search = Search(
        model, params, [batch], DEPTH, jax.random.key(0), has_answers=False, names=NAMES
    )
    assert search.full == ExitScores(1.0, DEPTH)
    for name in NAMES:
        exits = search.find(name, 0.9)
        if exits.scores is None:
            continue
        assert exits.scores.accuracy >= 0.9 and exits.scores.mean_steps <= DEPTH
        (looser, *_), _ = _split(search._candidates(name), exits.threshold)
        if looser is not None:
            said, steps = search._decode(name, looser)
            assert search._judge.score(said, steps).accuracy < 0.9
    assert search.find("latent_diff", 0.9).scores is not None


def _split(candidates, threshold):
    """The next looser candidate, if there is one, and the stricter ones."""
    place = candidates.index(threshold)
    return (candidates[place - 1] if place else None,), candidates[place + 1 :]


@pytest.mark.parametrize("size", [0, 1, 2, 7, 20])
def test_the_first_that_passes_is_found_wherever_it_begins(size):
    for first in range(size + 1):
        for start in range(size):
            tried = []

            def score(candidate, tried=tried):
                tried.append(candidate)
                return ExitScores(candidate, 1.0)

            found = find_first(
                range(size), score, lambda scores, first=first: scores.accuracy >= first, start
            )
            assert (None if found is None else found[0]) == (first if first < size else None)
            assert len(tried) == len(set(tried)) <= 2 * max(size, 1).bit_length() + 1
    assert find_first([], lambda _: ExitScores(1.0, 1.0), lambda _: True, 0) is None
