"""Prompts in one pass, in chunks and next to others: the same cache, logits and state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import DEPTH, PLAIN, PROMPTS, TINY, all_logits, depth_rule, make, tiny

from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.prefill import left_padded, prefill, repeat_rows
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache

CAPACITY = 64
WINDOW_RANDOM = tiny(attention={"window": 4}, recurrence={"state_init": "normal"})


def prefilled(config, prompts=PROMPTS, rule=None, columns=16, chunk=None, keys=None, slots=8):
    model, params = make(config)
    cache = init_cache(
        config,
        CacheShape(
            len(prompts), CAPACITY, num_slots=slots, dtype=jnp.dtype(jnp.float32), platform="cpu"
        ),
    )
    history = history_of_prompts(prompts, CAPACITY, pad_id=0)
    rule = depth_rule() if rule is None else rule
    return prefill(model, params, left_padded(history, keys, columns), cache, rule, chunk=chunk)


def row_keys():
    return jax.random.split(jax.random.key(8), len(PROMPTS))


@pytest.mark.parametrize("config", [WINDOW_RANDOM, PLAIN], ids=["random", "plain"])
def test_prefill_equals_full_recomputation(config):
    """Of each row's last token; in chunks of 16 the first one holds padding only."""
    keys = row_keys() if config is WINDOW_RANDOM else None
    for columns, chunk in ((16, None), (32, 16)):
        result = prefilled(config, columns=columns, chunk=chunk, keys=keys)
        for row, prompt in enumerate(PROMPTS):
            key = None if keys is None else keys[row]
            wanted = all_logits(*make(config), prompt, key=key)[-1]
            np.testing.assert_allclose(result.logits[row], wanted, atol=2e-5, rtol=1e-5)
        assert result.num_steps.tolist() == [0 if config is PLAIN else DEPTH] * 3
        assert result.cache.length == columns
        assert result.cache.next_position.tolist() == [len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("chunk", [3, 5, 16, 99])
def test_chunks_of_any_size_leave_the_same(chunk):
    """Cache, state and steps, with tokens that leave early."""
    rule = depth_rule(8, "latent_diff", 0.3)
    whole = prefilled(TINY, rule=rule)
    result = prefilled(TINY, rule=rule, chunk=chunk)
    assert len(np.unique(whole.cache.num_steps)) > 2
    for wanted, got in zip(jax.tree.leaves(whole), jax.tree.leaves(result), strict=True):
        if jnp.issubdtype(got.dtype, jnp.integer):
            np.testing.assert_array_equal(got, wanted)
    written = np.asarray(whole.cache.positions >= 0)
    for kind in ("prelude", "core", "coda"):
        wanted, got = (
            np.moveaxis(np.asarray(getattr(r.cache, kind)), 2, -1) for r in (whole, result)
        )  # [entries, B, S, P, K]; what stands in padding has no meaning
        np.testing.assert_allclose(got[:, written], wanted[:, written], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(result.core_state, whole.core_state, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(result.logits, whole.logits, atol=2e-5, rtol=1e-5)


def test_a_prompt_does_not_see_the_others_nor_what_fills_its_row():
    rule = depth_rule(8, "latent_diff", 0.3)
    together = prefilled(TINY, rule=rule)
    for row, prompt in enumerate(PROMPTS):
        others = [[3, 3]] * row + [prompt] + [[8] * 14] * (2 - row)
        result = prefilled(TINY, others, rule)
        assert result.num_steps[row] == together.num_steps[row]
        np.testing.assert_allclose(result.logits[row], together.logits[row], atol=2e-5)
        np.testing.assert_allclose(result.core_state[row], together.core_state[row], atol=2e-5)


def test_repeated_rows_stand_next_to_each_other():
    result = prefilled(TINY, rule=depth_rule(8, "latent_diff", 0.3))
    repeated = repeat_rows(result, 2)
    for wanted, got in zip(
        (result.logits, result.core_state, result.num_steps, result.cache.positions),
        (repeated.logits, repeated.core_state, repeated.num_steps, repeated.cache.positions),
        strict=True,
    ):
        np.testing.assert_array_equal(got, np.repeat(wanted, 2, axis=0))
    np.testing.assert_array_equal(repeated.cache.core, np.repeat(result.cache.core, 2, axis=1))
    assert repeated.cache.length == result.cache.length
    assert repeated.cache.next_position.tolist() == [7, 7, 2, 2, 11, 11]
