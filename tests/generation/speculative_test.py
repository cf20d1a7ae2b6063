"""Greedy speculation gives what the loop gives one by one, whatever is drafted and accepted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculative_start import COLUMNS, DEPTH, begin, decoded, rows, settings, speculated
from tiny_model import PLAIN, TINY, Pieces, depth_rule, make, tiny

from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation import speculative
from megatransformer_jax.generation.decode_loop import decode
from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    EXHAUSTED,
    STOP,
    piece_table,
    stop_strings,
)
from megatransformer_jax.generation.processors.penalties import (
    CountPenalty,
    NoRepeatNgram,
    RepetitionPenalty,
)
from megatransformer_jax.generation.processors.words import forced_words
from megatransformer_jax.generation.speculative import rows_needed, speculate

COUNT = 40
CONFIGS = {
    "rotary": TINY,
    "alibi_window_grouped_two_core_layers": tiny(
        core_layers=2,
        attention={"num_kv_heads": 2, "window": 6},
        positions={"scheme": "alibi"},
        recurrence={"state_init": "normal"},
    ),
    # No position to spare behind the longest text.
    "learned_sandwich_core_width": tiny(
        max_length=11 + COUNT,
        positions={"scheme": "learned"},
        norm={"placement": "sandwich"},
        recurrence={"state_init": "like_init", "core_width": 8},
    ),
}


def assert_same(state, wanted):
    """But for what stands in the caches."""
    assert rows(state) == rows(wanted)
    np.testing.assert_array_equal(state.end.reason, wanted.end.reason)
    np.testing.assert_array_equal(state.steps, wanted.steps)
    np.testing.assert_allclose(state.scores, wanted.scores, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_equals_decoding_one_by_one(name):
    config = CONFIGS[name]
    wanted = decoded(config, settings(count=COUNT))
    assert len(set().union(*rows(wanted))) > 5
    for draft_depth in (1, 4):
        state, stats = speculated(config, settings(count=COUNT), draft_depth)
        assert_same(state, wanted)
        # Some drafts are right, some are wrong, and not the same in all rows.
        assert 0 < np.sum(stats.num_accepted) < np.sum(stats.num_drafted)
        assert len(set(stats.num_accepted.tolist())) > 1
        np.testing.assert_array_equal(state.cache.next_position, wanted.cache.next_position)
        # As many rows as without speculation, whatever was accepted.
        assert int(state.cache.length) == int(wanted.cache.length)


def test_drafts_at_full_depth_are_all_accepted():
    """A deeper draft than the depth is one at the depth."""
    count = 1 + 4 * 6
    for draft_depth in (DEPTH, 50):
        state, stats = speculated(TINY, settings(count=count), draft_depth)
        assert rows(state) == rows(decoded(TINY, settings(count=count)))
        np.testing.assert_array_equal(stats.num_accepted, stats.num_drafted)
        assert stats.num_accepted.tolist() == [18, 18, 18]
        assert int(stats.num_rounds) == 6


def test_numbers_may_differ_between_rows():
    given = settings(depth=[2, 6, 4], count=[1, COUNT, 7])
    state, stats = speculated(TINY, given, draft_depth=2)
    assert_same(state, decoded(TINY, given))
    assert [len(row) for row in rows(state)] == [1, COUNT, 7]
    # The first token comes from the prompt, so the first row has none to draft.
    assert int(stats.num_drafted[0]) == 0


def processed(count=COUNT, with_ends=True):
    """Penalties, bans, words that must come, and ends of all kinds."""
    chain = (
        RepetitionPenalty(jnp.float32(1.1), TINY.vocab_size),
        CountPenalty(jnp.float32(0.2), jnp.float32(0.1), TINY.vocab_size),
        NoRepeatNgram(jnp.int32(3), 4),
        forced_words([[[5, 6]]], COUNT, eos_id=2),
    )
    if not with_ends:
        return settings(count=count, chain=chain)
    stops = stop_strings(["cbcx"], piece_table(Pieces(), TINY.vocab_size))
    return settings(count=count, end_ids=(26,), stops=stops, chain=chain)


@pytest.mark.parametrize("draft_depth", [1, DEPTH])
def test_processors_and_endings_work_within_accepted_runs(draft_depth):
    """At full depth runs are accepted whole, so that texts end in the middle of one."""
    wanted = decoded(TINY, processed())
    assert wanted.end.reason.tolist() == [END_OF_TEXT, STOP, STOP]
    sizes = [len(row) for row in rows(wanted)]
    assert len(set(sizes)) == 3 and max(sizes) < COUNT
    state, stats = speculated(TINY, processed(), draft_depth)
    assert_same(state, wanted)
    if draft_depth == DEPTH:
        assert any((size - 1) % 4 for size in sizes)
        np.testing.assert_array_equal(stats.num_accepted, stats.num_drafted)


@pytest.mark.parametrize("draft_depth", [1, DEPTH])
def test_a_row_in_which_every_token_is_banned_ends_there(draft_depth):
    """No token may come twice, and there are 32."""
    given = settings(count=COUNT, chain=(NoRepeatNgram(jnp.int32(1), 4),))
    wanted = decoded(TINY, given)
    assert wanted.end.reason.tolist() == [EXHAUSTED] * 3
    assert_same(speculated(TINY, given, draft_depth)[0], wanted)


def test_it_can_be_interrupted_and_mixed_with_the_loop():
    """After each round everything is as after decoding one by one."""
    given, (model, params) = processed(), make(TINY)
    state = begin(TINY, given)
    sizes = []
    for number in range(4):
        state, stats = speculate(
            model, params, given, state, draft_depth=2, draft_length=3, max_rounds=2
        )
        assert int(stats.num_rounds) == 2
        sizes.append([len(row) for row in rows(state)])
        for row, size in enumerate(sizes[-1]):
            alone = decode(model, params, given, begin(TINY, given), jnp.int32(size - 1))
            assert rows(alone)[row] == rows(state)[row]
            for got, wanted in zip(
                jax.tree.leaves((state.core_state, state.chain_states, state.end, state.scores)),
                jax.tree.leaves((alone.core_state, alone.chain_states, alone.end, alone.scores)),
                strict=True,
            ):
                np.testing.assert_allclose(got[row], wanted[row], atol=1e-4)
            assert int(state.cache.next_position[row]) == int(alone.cache.next_position[row])
        if number % 2:
            state = decode(model, params, given, state, jnp.int32(3))
    assert any(len(set(three)) == 3 for three in sizes)
    state = decode(model, params, given, state, jnp.int32(COUNT))
    assert_same(state, decoded(TINY, given))


def test_the_smallest_cache_is_enough():
    """Of 64 rows 16 are the prompt's."""
    count = 64 - COLUMNS - 3
    assert rows_needed(count, 3) == 64 - COLUMNS
    state, stats = speculated(TINY, settings(count=count), draft_depth=2)
    assert len(set(stats.num_accepted.tolist())) > 1
    assert rows(state) == rows(decoded(TINY, settings(count=count)))
    with pytest.raises(UserError, match="64 rows, and 65"):
        speculated(TINY, settings(count=count + 1))


def test_other_numbers_compile_nothing():
    given = settings(count=9)
    speculated(TINY, given)
    before = speculative._run_rounds._cache_size()
    for draft_depth, depth, count in ((2, 4, 7), (3, 8, 1), (1, 1, 12)):
        speculated(TINY, settings(depth=depth, count=count), draft_depth)
    model, params = make(TINY)
    state = begin(TINY, given, prompts=([4, 4], [3] * 16, [1]))
    speculate(model, params, given, state, draft_depth=1, draft_length=3, max_rounds=1)
    assert speculative._run_rounds._cache_size() == before


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"draft_depth": 0}, "draft_depth is 0"),
        ({}, {"draft_length": 0}, "draft_length is 0"),
        ({"rule": depth_rule(DEPTH, "kl")}, {}, "not 'kl'"),
        ({"warm_start": True}, {}, "warm_start"),
        ({"rule": depth_rule([3, 9, 2])}, {}, "each of the 9 iterations, and there are 8"),
    ],
)
def test_what_cannot_be_decoded_speculatively_is_refused(changes, options, message):
    state = begin(TINY, settings())
    given = dataclasses.replace(settings(), **changes)
    options = {"draft_depth": 1, "draft_length": 3, **options}
    with pytest.raises(UserError, match=message):
        speculate(*make(TINY), given, state, **options)


def test_a_model_without_a_core_is_refused():
    state = begin(PLAIN, settings())
    with pytest.raises(UserError, match="this model has none"):
        speculate(*make(PLAIN), settings(), state, draft_depth=1, draft_length=3)


def test_a_history_without_room_is_refused():
    given, (model, params) = settings(count=40), make(TINY)
    state = begin(TINY, given)
    short = dataclasses.replace(state.history, tokens=state.history.tokens[:, :50])
    state = dataclasses.replace(state, history=short)
    with pytest.raises(UserError, match="50 tokens per row, and 51 are needed"):
        speculate(model, params, given, state, draft_depth=1, draft_length=1)
