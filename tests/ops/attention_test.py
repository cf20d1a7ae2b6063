"""The attention function against the definition, for every combination of its options."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import attend, attention_reference
from jax.sharding import Mesh

from megatransformer_jax.ops import attention_xla
from megatransformer_jax.ops.attention import UnsupportedKernelError
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import alibi_slopes
from megatransformer_jax.sharding.rules import Sharder

B, T, N, H = 2, 4, 4, 8
SPARE = 2  # cache rows after the last query
# Kind of cache: rows before the first query of each sequence, and how the mask tells them.
CACHES = {
    "no_cache": ([0, 0], lambda offsets: 0, 0),
    "static_offset": ([3, 3], lambda offsets: 3, SPARE),
    "traced_offset": ([3, 3], lambda offsets: jnp.int32(3), SPARE),
    "offset_per_sequence": ([1, 3], lambda offsets: jnp.asarray(offsets, jnp.int32), SPARE),
}
OTHER_OPTIONS = list(
    itertools.product(
        (True, False),  # is_causal
        (False, True),  # ALiBi
        (4, 2, 1),  # KV heads
        (None, 3),  # window
        (None, 2.0),  # soft-cap
    )
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes four queries two blocks, so that the small tests cover the blocked path."""
    monkeypatch.setattr(attention_xla, "MIN_BLOCK_ROWS", 2)


def random_inputs(kv_heads, key_length, query_length=T, width=H, dtype=jnp.float32):
    rng = np.random.default_rng(kv_heads * 100 + key_length)
    return tuple(
        jnp.asarray(rng.normal(size=(B, length, heads, width)) * 1.5, dtype)
        for length, heads in ((query_length, N), (key_length, kv_heads), (key_length, kv_heads))
    )


def row_ids(padding, offsets, key_length):
    """Segment ids of all rows of the cache [B, S], or None. Spare rows carry a live id."""
    if padding == "none":
        return None
    ids = np.ones((B, key_length), np.int32)
    for b, offset in enumerate(offsets):
        used = offset + T
        if padding == "left":
            ids[b, : offset + 1 + b] = 0
        elif padding == "right":
            ids[b, used - 1 - b : used] = 0
        else:
            ids[b, :used] = 1 + np.arange(used) // (2 + b)
            ids[b, used - 1] = 0
    return ids


def query_rows(ids, offsets):
    return np.stack([ids[b, offset : offset + T] for b, offset in enumerate(offsets)])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("padding", ["none", "left", "right", "segments"])
def test_equals_definition_for_every_combination(cache, padding, small_blocks):
    offsets, tell, spare = CACHES[cache]
    key_length = max(offsets) + T + spare
    key_ids = row_ids(padding, offsets, key_length)
    query_ids = None if key_ids is None else query_rows(key_ids, offsets)
    for is_causal, has_alibi, kv_heads, window, softcap in OTHER_OPTIONS:
        query, key, value = random_inputs(kv_heads, key_length)
        slopes = alibi_slopes(N) if has_alibi else None
        mask = AttentionMask(
            is_causal=is_causal,
            window=window,
            query_offset=tell(offsets),
            query_segment_ids=None if query_ids is None else jnp.asarray(query_ids),
            key_segment_ids=None if key_ids is None else jnp.asarray(key_ids),
        )
        output = attend(
            query, key, value, mask, platform="cpu", logit_softcap=softcap, alibi_slopes=slopes
        )
        expected = attention_reference(
            query,
            key,
            value,
            is_causal=is_causal,
            window=window,
            offsets=offsets,
            query_ids=query_ids,
            key_ids=key_ids,
            softcap=softcap,
            slopes=slopes,
        )
        np.testing.assert_allclose(
            output,
            expected,
            atol=2e-6,
            err_msg=f"{is_causal=} {has_alibi=} {kv_heads=} {window=} {softcap=}",
        )
        blind = ~expected.any(axis=(2, 3))
        assert np.all(np.asarray(output)[blind] == 0.0)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_derivatives_equal_finite_differences(kv_heads, softcap, small_blocks):
    ids = np.array([[0, 1, 1, 2], [1, 1, 1, 0]], np.int32)
    mask = AttentionMask(
        query_segment_ids=jnp.asarray(ids), key_segment_ids=jnp.asarray(ids), window=3
    )
    rng = np.random.default_rng(0)
    primals = (*random_inputs(kv_heads, T), alibi_slopes(N))
    tangents = [jnp.asarray(rng.normal(size=p.shape), jnp.float32) for p in primals]
    cotangent = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)

    def run(query, key, value, slopes):
        return attend(
            query, key, value, mask, platform="cpu", logit_softcap=softcap, alibi_slopes=slopes
        )

    def reference(step):
        moved = [
            np.asarray(p, np.float64) + step * np.asarray(t)
            for p, t in zip(primals, tangents, strict=True)
        ]
        query, key, value, slopes = moved
        options = {"window": 3, "query_ids": ids, "key_ids": ids, "softcap": softcap}
        return attention_reference(query, key, value, slopes=slopes, **options)

    expected = (reference(1e-5) - reference(-1e-5)) / 2e-5
    forward = jax.jvp(run, primals, tuple(tangents))[1]
    np.testing.assert_allclose(forward, expected, atol=2e-5)
    gradients = jax.vjp(run, *primals)[1](cotangent)
    backward = sum(float(jnp.vdot(g, t)) for g, t in zip(gradients, tangents, strict=True))
    np.testing.assert_allclose(backward, np.vdot(cotangent, expected), rtol=1e-4, atol=1e-4)


def test_blind_rows_and_padding_keys_get_zero_gradient():
    ids = jnp.asarray([[0, 0, 0, 0], [1, 1, 1, 0]], jnp.int32)
    mask = AttentionMask(query_segment_ids=ids, key_segment_ids=ids)
    inputs = random_inputs(2, T)
    gradients = jax.grad(
        lambda *arrays: jnp.sum(attend(*arrays, mask, platform="cpu") ** 2), argnums=(0, 1, 2)
    )(*inputs)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[np.asarray(ids) == 0] == 0.0)
        assert np.any(np.asarray(gradient)[1, :3] != 0.0)


def test_unused_capacity_has_no_influence():
    query, key, value = random_inputs(2, 9)
    mask = AttentionMask(is_causal=False, query_offset=jnp.int32(3))
    before = attend(query, key, value, mask, platform="cpu")
    after = attend(query, key.at[:, 7:].set(1e4), value.at[:, 7:].set(-1e4), mask, platform="cpu")
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("has_alibi", [False, True])
def test_token_by_token_with_cache_equals_whole_sequence(has_alibi):
    query, key, value = random_inputs(2, T)
    slopes = alibi_slopes(N) if has_alibi else None
    whole = attend(query, key, value, AttentionMask(window=3), platform="cpu", alibi_slopes=slopes)
    for t in range(T):
        mask = AttentionMask(window=3, query_offset=jnp.int32(t))
        one = attend(query[:, t : t + 1], key, value, mask, platform="cpu", alibi_slopes=slopes)
        np.testing.assert_allclose(one[:, 0], whole[:, t], atol=1e-6)


@pytest.mark.parametrize("window", [None, 70])
def test_blocks_of_queries_equal_one_block(window):
    length = 200
    query, key, value = random_inputs(2, length + 9, query_length=length)
    ids = jnp.asarray(1 + np.arange(length + 9)[None].repeat(B, 0) // 90, jnp.int32)
    mask = AttentionMask(
        window=window, query_offset=4, query_segment_ids=ids[:, 4 : 4 + length], key_segment_ids=ids
    )
    assert len(attention_xla.query_blocks(mask, length, length + 9, True)) == 4
    assert len(attention_xla.query_blocks(mask, length, length + 9, False)) == 1
    run = attention_xla.attention_xla
    np.testing.assert_allclose(
        run(query, key, value, mask),
        run(query, key, value, mask, rows_are_whole=False),
        atol=2e-6,
    )


def test_blocks_skip_what_lies_in_the_future():
    blocks = attention_xla.query_blocks(AttentionMask(), 256, 256, True)
    assert [(rows.stop - rows.start) * keys.stop for rows, keys in blocks] == [
        64 * stop for stop in (64, 128, 192, 256)
    ]
    window = attention_xla.query_blocks(AttentionMask(window=10), 256, 256, True)
    assert [keys.start for _, keys in window] == [0, 55, 119, 183]


def test_bfloat16_stays_close_and_keeps_type():
    query, key, value = random_inputs(2, T, dtype=jnp.bfloat16)
    output = attend(query, key, value, AttentionMask(), platform="cpu")
    assert output.dtype == jnp.bfloat16
    expected = attention_reference(*(a.astype(jnp.float32) for a in (query, key, value)))
    np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.03)


def test_head_mask_multiplies_each_head():
    query, key, value = random_inputs(2, T)
    head_mask = jnp.asarray([0.0, 1.0, 0.5, -2.0])
    output = attend(query, key, value, AttentionMask(), platform="cpu", head_mask=head_mask)
    expected = attention_reference(query, key, value, head_mask=np.asarray(head_mask))
    np.testing.assert_allclose(output, expected, atol=2e-6)


def test_dropout_keeps_the_mean_and_depends_on_the_key_only():
    query, key, _ = random_inputs(4, T)
    samples = 1000
    query, key = (jnp.broadcast_to(a[:1], (samples, *a.shape[1:])) for a in (query, key))
    # One-hot values (H >= S), so that the output shows the weights themselves.
    value = jnp.broadcast_to(jnp.eye(T, H)[None, :, None, :], key.shape)

    def run(rate, seed):
        dropout_key = jax.random.key(seed)
        options = {"dropout_rate": rate, "dropout_key": dropout_key, "platform": "cpu"}
        return np.asarray(attend(query, key, value, AttentionMask(), **options))

    plain, dropped = run(0.0, 0), run(0.25, 0)
    np.testing.assert_array_equal(dropped, run(0.25, 0))
    assert np.any(dropped != run(0.25, 1))
    visible = plain > 0
    assert np.mean(dropped[visible] == 0) == pytest.approx(0.25, abs=0.005)
    np.testing.assert_allclose(dropped.mean(axis=0), plain[0], atol=0.07)
    kept = visible & (dropped != 0)
    np.testing.assert_allclose(dropped[kept], plain[kept] / 0.75, rtol=1e-5)


def test_dropout_differs_between_blocks(small_blocks):
    ones = jnp.ones((1, 4, 1, H))
    # Window 1: each query sees itself only, so the output is its one weight, kept or not.
    outputs = [
        attend(
            ones,
            ones,
            ones,
            AttentionMask(window=1),
            platform="cpu",
            dropout_rate=0.5,
            dropout_key=jax.random.key(seed),
        )[0, :, 0, 0]
        for seed in range(16)
    ]
    first, second = np.asarray(outputs)[:, :2], np.asarray(outputs)[:, 2:]
    assert np.any(first != second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout_rate": 0.1}, "its key is None; give a key"),
        ({"dropout_rate": 1.0}, "rate is 1.0"),
        ({"logit_softcap": 0.0}, "logit_softcap is 0.0"),
        ({"kernel": "flash"}, "'flash'; choose one of"),
        ({"platform": "abacus"}, "platform is 'abacus'"),
    ],
)
def test_bad_options_are_errors(change, message):
    query, key, value = random_inputs(2, T)
    with pytest.raises(ValueError, match=message):
        attend(query, key, value, AttentionMask(), **{"platform": "cpu", **change})


def test_head_counts_must_divide():
    query, key, value = random_inputs(3, T)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 KV heads"):
        attend(query, key, value, AttentionMask(), platform="cpu")


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_named_kernel_that_cannot_serve_is_an_error(kernel):
    query, key, value = random_inputs(2, T)
    with pytest.raises(
        UnsupportedKernelError, match=r"does not run on 'cpu'.*model.attention.kernel to 'auto'"
    ):
        attend(query, key, value, AttentionMask(), platform="cpu", kernel=kernel)


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_cut_over_devices_stay_whole_in_the_program(is_causal):
    """A causal call gathers keys and values itself; queries stay where they are."""
    mesh = Mesh(
        np.array(jax.devices()[:2]).reshape(1, 1, 1, 2), ("data", "fsdp", "tensor", "sequence")
    )
    sharder = Sharder(mesh)
    query, key, value = random_inputs(1, 256, query_length=256)
    mask = AttentionMask(is_causal=is_causal)
    run = jax.jit(
        lambda q, k, v: attend(q, k, v, mask, platform="cpu", sharder=sharder),
        in_shardings=(
            sharder.sharding("batch", "length", None, None),
            sharder.sharding(None, None, None, None),
            sharder.sharding(None, None, None, None),
        ),
    )
    compiled = run.lower(query, key, value).compile()
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in gathered]
    assert sizes == [key.size, value.size] * is_causal and key.size < query.size
    alone = attend(query, key, value, mask, platform="cpu")
    np.testing.assert_allclose(
        compiled(*jax.device_put((query, key, value), compiled.input_shardings[0])),
        alone,
        atol=2e-6,
    )
