"""Attention rules: their composition, their checks, and their life as a pytree."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.ops.masks import AttentionMask, check_mask, dense_mask

IDS = np.array([[0, 1, 1, 2, 2, 2], [3, 3, 3, 3, 0, 0]], np.int32)


@hypothesis.given(
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 7),
    offsets=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    has_segments=st.booleans(),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_rules_compose_by_and(is_causal, window, offsets, has_segments):
    length, key_length = 3, 6
    query_ids = np.stack([IDS[b, o : o + length] for b, o in enumerate(offsets)])
    mask = AttentionMask(
        is_causal,
        window,
        jnp.asarray(offsets, jnp.int32),
        jnp.asarray(query_ids) if has_segments else None,
        jnp.asarray(IDS) if has_segments else None,
    )
    allowed = np.broadcast_to(dense_mask(mask, length, key_length), (2, length, key_length))
    for b, t, s in np.ndindex(2, length, key_length):
        row = offsets[b] + t
        rules = [
            s < offsets[b] + length,
            not is_causal or s <= row,
            window is None or row - s < window,
            not has_segments or (query_ids[b, t] != 0 and query_ids[b, t] == IDS[b, s]),
        ]
        assert allowed[b, t, s] == all(rules), (b, t, s, rules)


def test_nothing_restricted_needs_no_array():
    assert dense_mask(AttentionMask(is_causal=False), 4, 4) is None
    assert dense_mask(AttentionMask(is_causal=False), 4, 5) is not None
    assert dense_mask(AttentionMask(), 4, 4).shape == (1, 4, 4)


def test_python_offset_stays_static_through_jit():
    seen = []

    @jax.jit
    def record(mask):
        seen.append(mask.query_offset)
        return dense_mask(mask, 2, 4)

    record(AttentionMask(query_offset=2))
    record(AttentionMask(query_offset=jnp.int32(2)))
    assert seen[0] == 2
    assert isinstance(seen[1], jax.core.Tracer)


def test_goes_through_scan_and_vmap():
    ids = jnp.asarray(IDS)
    mask = AttentionMask(window=2, query_segment_ids=ids, key_segment_ids=ids)
    expected = dense_mask(mask, 6, 6)
    carried, _ = jax.lax.scan(lambda carry, _: (carry, None), mask, length=2)
    np.testing.assert_array_equal(dense_mask(carried, 6, 6), expected)
    rows = jax.tree.map(lambda array: array[:, None], mask)
    mapped = jax.vmap(lambda row: dense_mask(row, 6, 6))(rows)
    np.testing.assert_array_equal(mapped[:, 0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "mask.window is 0"),
        ({"query_offset": 3}, r"query_offset is 3.*offsets 0 \.\. 2"),
        ({"query_offset": -1}, "query_offset is -1"),
        ({"query_offset": np.zeros(3, np.int32)}, r"shape \(3,\)"),
        ({"query_segment_ids": IDS[:, :4]}, "only query_segment_ids"),
        ({"key_segment_ids": IDS}, "only key_segment_ids"),
        ({"query_segment_ids": IDS, "key_segment_ids": IDS}, r"must be \(2, 4\)"),
    ],
)
def test_bad_masks_are_errors(change, message):
    mask = dataclasses.replace(AttentionMask(), **change)
    with pytest.raises(ValueError, match=message):
        check_mask(mask, 2, 4, 6)
