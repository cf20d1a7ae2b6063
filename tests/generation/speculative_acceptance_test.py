"""What comes of a draft is distributed as the target, whatever the draft was drawn from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chi_square import p_value

from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.speculative import (
    draw,
    judge,
    stream_keys,
)
from megatransformer_jax.streams import ACCEPT, DRAFT, REPLACE

ROWS, V = 20_000, 6
NEVER = -np.inf


@functools.partial(jax.jit, static_argnames="rows")
def outcome(target_scores, draft_scores, key, is_drafted=True, rows=ROWS):
    """Tokens of independent rows, and which were accepted."""
    keys = [jax.random.split(jax.random.fold_in(key, stream), rows) for stream in range(3)]
    target_scores = jnp.broadcast_to(target_scores, (rows, target_scores.size))
    draft_scores = jnp.broadcast_to(draft_scores, target_scores.shape)
    drafts = draw(draft_scores, keys[DRAFT])
    return judge(
        target_scores,
        draft_scores,
        drafts,
        jnp.broadcast_to(is_drafted, drafts.shape),
        keys[ACCEPT],
        keys[REPLACE],
    )


def counts_of(tokens):
    return np.bincount(np.asarray(tokens), minlength=V)


def softmax(scores):
    weights = np.exp(np.asarray(scores, np.float64) - np.max(scores))
    return weights / weights.sum()


def scores(seed, scale=1.5):
    return np.random.default_rng(seed).normal(0, scale, V).astype(np.float32)


def banned(scores, *tokens):
    scores = scores.copy()
    scores[list(tokens)] = NEVER
    return scores


CASES = {
    "random_0": (scores(0), scores(1)),
    "random_1": (scores(2), scores(3)),
    "sharp_target": (scores(4, 4), scores(5)),
    "sharp_draft": (scores(6), scores(7, 4)),
    "shifted": (scores(8), scores(8) + 30),
    "target_bans": (banned(scores(9), 0, 4), scores(10)),
    "draft_bans": (scores(11), banned(scores(12), 1, 2)),
    "nothing_in_common": (banned(scores(13), 0, 1, 2), banned(scores(14), 3, 4, 5)),
    "one_token": (banned(scores(15), 0, 1, 2, 3, 4), scores(16)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_distributed_as_the_target(name):
    target, draft = CASES[name]
    tokens, is_accepted = outcome(target, draft, jax.random.key(1))
    assert p_value(counts_of(tokens), softmax(target)) > 0.01
    # As often as possible: the two overlap in sum(min(p, q)).
    overlap = np.minimum(softmax(target), softmax(draft)).sum()
    deviation = np.sqrt(overlap * (1 - overlap) / ROWS)
    assert abs(np.mean(is_accepted) - overlap) <= 4 * deviation + 1e-6


def test_the_test_can_fail():
    """Drafts that are all accepted are found out, and so are replacements drawn from p."""
    target, draft = CASES["random_0"]
    drafts = draw(jnp.tile(draft, (ROWS, 1)), jax.random.split(jax.random.key(2), ROWS))
    assert p_value(counts_of(drafts), softmax(target)) < 1e-6
    tokens, is_accepted = outcome(target, draft, jax.random.key(1))
    again = draw(jnp.tile(target, (ROWS, 1)), jax.random.split(jax.random.key(3), ROWS))
    wrong = np.where(is_accepted, tokens, again)
    assert p_value(counts_of(wrong), softmax(target)) < 1e-6


def test_a_row_without_a_draft_is_drawn_from_the_target():
    target, draft = CASES["random_1"]
    tokens, is_accepted = outcome(target, draft, jax.random.key(4), is_drafted=False)
    assert not np.any(is_accepted)
    assert p_value(counts_of(tokens), softmax(target)) > 0.01


def test_equal_distributions_accept_everything():
    same = scores(17)
    tokens, is_accepted = outcome(same, same, jax.random.key(5))
    assert np.all(is_accepted)
    assert p_value(counts_of(tokens), softmax(same)) > 0.01


def test_a_rejection_with_nothing_left_of_the_target_is_drawn_from_it():
    """Rounding can lead there. Here a draft does that was drawn from neither of two equal ones."""
    same = jnp.tile(banned(scores(20), 3), (ROWS, 1))
    keys = jax.random.split(jax.random.key(6), ROWS)
    drafts, is_drafted = jnp.full(ROWS, 3, jnp.int32), jnp.ones(ROWS, bool)
    tokens, is_accepted = judge(same, same, drafts, is_drafted, keys, keys)
    assert not np.any(is_accepted)
    assert p_value(counts_of(tokens), softmax(same[0])) > 0.01


def test_a_row_with_every_token_banned_harms_no_other():
    target = jnp.asarray(np.stack([np.full(V, NEVER), scores(18)]), jnp.float32)
    draft = jnp.asarray(np.stack([scores(19), np.full(V, NEVER)]), jnp.float32)
    keys = jax.random.split(jax.random.key(7), 2)
    given = (jnp.int32([3, 0]), jnp.array([True, False]), keys, keys)
    tokens, is_accepted = judge(target, draft, *given)
    assert not np.any(is_accepted)
    wanted = draw(jax.nn.log_softmax(target[1:]), keys[1:])
    assert int(tokens[1]) == int(wanted[0])


def test_streams_differ_and_depend_on_key_and_length_alone():
    keys = jax.random.split(jax.random.key(9), 2)[jnp.array([0, 0, 1, 0])]
    history = History(
        jnp.zeros((4, 9), jnp.int32), jnp.int32([4, 5, 4, 4]), jnp.int32([1, 1, 1, 2])
    )
    drawn = np.stack(
        [
            jax.vmap(jax.random.uniform)(stream_keys(keys, history, stream))
            for stream in (DRAFT, ACCEPT, REPLACE)
        ]
    )
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 3])
    assert len(np.unique(drawn[:, :3])) == 9
