"""The compiled loop against full recomputation and against explicit loops over passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
    DEPTH,
    PLAIN,
    PROMPTS,
    TINY,
    depth_rule,
    make,
    recomputed_greedy,
    recomputed_score,
    tiny,
)

from megatransformer_jax.config.layers import SharingConfig
from megatransformer_jax.generation.decode_loop import DecodeSettings, decode, start
from megatransformer_jax.generation.endings import END_OF_TEXT, EXHAUSTED, LENGTH, Ending
from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.prefill import left_padded, prefill
from megatransformer_jax.generation.processors.cuts import Temperature
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache

CAPACITY, COUNT = 64, 10
CONFIGS = {
    "rotary": TINY,
    "alibi_window_grouped_two_core_layers": tiny(
        core_layers=2,
        attention={"num_kv_heads": 2, "window": 6},
        positions={"scheme": "alibi"},
        recurrence={"state_init": "normal"},
    ),
    "learned_sandwich_core_width": tiny(
        positions={"scheme": "learned"},
        norm={"placement": "sandwich"},
        recurrence={"state_init": "like_init", "core_width": 8},
    ),
    "plain": PLAIN,
    "layers_that_share_weights": tiny(
        prelude_layers=3,
        core_layers=3,
        sharing=SharingConfig(scheme="cycle_rev", prelude_unique=1, core_unique=2),
    ),
}


def row_keys():
    return jax.random.split(jax.random.key(8), len(PROMPTS))


def settings(rule=None, end_ids=(), count=COUNT, stops=None, chain=(), **options):
    return DecodeSettings(
        depth_rule() if rule is None else rule,
        chain,
        Ending(jnp.asarray(end_ids, jnp.int32), jnp.asarray(count, jnp.int32), stops),
        row_keys(),
        **options,
    )


def read_prompts(config, given):
    cache = init_cache(
        config,
        CacheShape(
            len(PROMPTS), CAPACITY, num_slots=8, dtype=jnp.dtype(jnp.float32), platform="cpu"
        ),
    )
    history = history_of_prompts(PROMPTS, CAPACITY, pad_id=0)
    model, params = make(config)
    prompts = left_padded(history, given.row_keys, 16)
    return prefill(model, params, prompts, cache, given.rule)


def begin(config, given):
    history = history_of_prompts(PROMPTS, CAPACITY, pad_id=0)
    return start(given, read_prompts(config, given), history)


def run(config, given, max_tokens=COUNT):
    return decode(*make(config), given, begin(config, given), jnp.int32(max_tokens))


def new_tokens(state, row):
    first, last = int(state.history.prompt_lengths[row]), int(state.history.lengths[row])
    return np.asarray(state.history.tokens)[row, first:last].tolist()


def new_steps(state, row):
    first, last = int(state.history.prompt_lengths[row]), int(state.history.lengths[row])
    assert not np.any(np.asarray(state.steps)[row, :first])
    assert not np.any(np.asarray(state.steps)[row, last:])
    return np.asarray(state.steps)[row, first:last].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_full_recomputation(name):
    """Tokens and scores of unequal prompts in one batch."""
    config = CONFIGS[name]
    is_random = config.is_recurrent and config.recurrence.state_init not in ("zero", "none")
    state, seen = run(config, settings()), set()
    for row, prompt in enumerate(PROMPTS):
        key = row_keys()[row] if is_random else None
        wanted = recomputed_greedy(*make(config), prompt, COUNT, key=key)
        seen |= set(wanted)
        assert new_tokens(state, row) == wanted
        assert new_steps(state, row) == [DEPTH if config.is_recurrent else 0] * COUNT
        score = recomputed_score(*make(config), prompt, wanted, key=key)
        assert float(state.scores[row]) == pytest.approx(score, abs=1e-4)
    assert state.end.reason.tolist() == [LENGTH] * 3
    assert len(seen) > 5  # A model that repeats itself shows little.


def test_it_can_be_interrupted_anywhere():
    """Also of draws, penalties and texts that end differently."""
    chain = (Temperature(jnp.float32(1.5)),)
    given = settings(end_ids=(4, 9), chain=chain, is_drawn=True, warm_start=True)
    whole = run(TINY, given)
    assert len(set(whole.history.lengths.tolist())) > 1
    state = begin(TINY, given)
    for count in (1, 0, 3, 1, COUNT, 5):
        state = decode(*make(TINY), given, state, jnp.int32(count))
    for wanted, got in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_call_adds_as_many_tokens_as_it_is_told():
    state = begin(TINY, settings())
    lengths = np.array(state.history.lengths)  # A copy: the state is donated.
    for added in (3, 0, 2):
        state = decode(*make(TINY), settings(), state, jnp.int32(added))
        lengths = lengths + added
        np.testing.assert_array_equal(state.history.lengths, lengths)


def test_a_row_without_a_token_to_choose_from_keeps_nothing_of_the_pass():
    given = settings()
    before = read_prompts(TINY, given)
    before = before.replace(logits=before.logits.at[1].set(-jnp.inf))
    state = start(given, before, history_of_prompts(PROMPTS, CAPACITY, pad_id=0))
    assert state.end.reason.tolist() == [0, EXHAUSTED, 0]
    assert new_tokens(state, 1) == new_steps(state, 1) == []
    assert [new_steps(state, row) for row in (0, 2)] == [[DEPTH], [DEPTH]]
    assert float(state.scores[1]) == 0


def test_an_ended_row_waits_and_the_others_go_on():
    free = [new_tokens(run(TINY, settings()), row) for row in range(3)]
    # A token that some rows have, not as their first one, and another has not.
    end = next(
        token
        for token in free[1][1:]
        if 0 < sum(token in row for row in free) < 3 and token != free[1][0]
    )
    unused = next(token for token in range(32) if all(token not in row for row in free))
    state = run(TINY, settings(end_ids=(unused, end)))
    for row in range(3):
        size = free[row].index(end) + 1 if end in free[row] else COUNT
        assert new_tokens(state, row) == free[row][:size]
        reason = END_OF_TEXT if end in free[row] else LENGTH
        assert int(state.end.reason[row]) == reason
        score = recomputed_score(*make(TINY), PROMPTS[row], free[row][:size])
        assert float(state.scores[row]) == pytest.approx(score, abs=1e-4)
        # The last token is never passed through the model.
        assert int(state.cache.next_position[row]) == len(PROMPTS[row]) + size - 1


def test_the_loop_ends_with_its_last_row():
    free = run(TINY, settings(count=4))
    assert int(free.cache.length) == 16 + 3
    again = decode(*make(TINY), settings(count=4), free, jnp.int32(5))
    assert int(again.cache.length) == 16 + 3


def test_numbers_may_differ_between_rows():
    """Depths, lengths and temperatures of three requests in one batch: each as if alone."""
    depths, counts, temperatures = [1, 3, 7], [3, 9, 6], [0.0, 0.7, 2.0]
    chain = (Temperature(jnp.asarray(temperatures, jnp.float32)),)
    state = run(TINY, settings(depth_rule(depths), count=counts, chain=chain, is_drawn=True))
    for row in range(3):
        # In the same place, so that nothing compiles again.
        alone = settings(
            depth_rule([depths[row]] * 3),
            count=[counts[row]] * 3,
            chain=(Temperature(jnp.full(3, temperatures[row], jnp.float32)),),
            is_drawn=True,
        )
        wanted = run(TINY, alone)
        assert new_tokens(state, row) == new_tokens(wanted, row)
        assert len(new_tokens(state, row)) == counts[row]
        assert new_steps(state, row) == [depths[row]] * counts[row]
    assert new_tokens(state, 0) == recomputed_greedy(*make(TINY), PROMPTS[0], 3, depth=1)


@functools.partial(jax.jit, static_argnames="model")
def one_pass(model, params, tokens, cache, rule, state, keys):
    new = NewTokens(tokens, jnp.ones(tokens.shape, bool), state=state, state_keys=keys)
    return cached_forward(model, params, new, cache, rule)


def explicit_loop(config, given):
    """Tokens and steps of the rows, [B, COUNT] each, by a call of the model for each token."""
    model, params = make(config)
    before = read_prompts(config, given)
    cache, state, logits, num_steps = (
        before.cache,
        before.core_state,
        before.logits,
        before.num_steps,
    )
    new, steps = [], []
    for _ in range(COUNT):
        new.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        steps.append(num_steps)
        state = state if given.warm_start else None
        out = one_pass(model, params, new[-1][:, None], cache, given.rule, state, given.row_keys)
        cache, state, logits, num_steps = (
            out.cache,
            out.state,
            out.logits[:, 0],
            out.num_steps[:, 0],
        )
    return np.stack(new, axis=1), np.stack(steps, axis=1)


@pytest.mark.parametrize(
    ("criterion", "threshold", "warm_start"),
    [("latent_diff", 0.3, False), ("argmax_stability", 2, True)],
)
def test_steps_and_first_states_equal_an_explicit_loop(criterion, threshold, warm_start):
    """Every row exits on its own; a warm token starts from the state of the one before."""
    rule = depth_rule(8, criterion, threshold, min_depth=2)
    given = settings(rule, warm_start=warm_start)
    config = CONFIGS["alibi_window_grouped_two_core_layers"]
    state = run(config, given)
    tokens, steps = explicit_loop(config, given)
    for row in range(3):
        assert new_tokens(state, row) == tokens[row].tolist()
        assert new_steps(state, row) == steps[row].tolist()
    assert steps.min() >= 2 and len(np.unique(steps)) > 2 and np.mean(steps) < 8
