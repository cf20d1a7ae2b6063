"""Attention to a cache against the definition, and what must not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.ops.attention_xla import LogitTerms
from megatransformer_jax.ops.cached_attention import CachedRows, cached_attention, side_by_side
from megatransformer_jax.ops.positions import alibi_slopes
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder

B, T, N, H, ENTRIES, ENTRY = 2, 3, 4, 8, 2, 1
BLOCK, CAPACITY = 64, 256
NO_MESH = Sharder()
LENGTHS = [0, 1, 63, 64, 65, 200, 256]
# KV heads, window, soft-cap, ALiBi. Windows: less than a block, and across two borders.
OPTIONS = [
    (4, None, None, False),
    (2, 10, None, True),
    (1, 130, 2.0, False),
    (2, None, 2.0, True),
]


def reference(query, key, value, query_positions, key_positions, *, window, softcap, slopes):
    """softmax(q k) v, query by query in float64; all keys [B, S, K, H] at positions [B, S]."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    mixed = np.zeros(query.shape)
    for b, t, n in np.ndindex(query.shape[:3]):
        distance = query_positions[b, t] - key_positions[b]
        seen = (key_positions[b] >= 0) & (distance >= 0)
        if window is not None:
            seen &= distance < window
        if not seen.any():
            continue
        k = n // (query.shape[2] // key.shape[2])
        logits = key[b, seen, k] @ query[b, t, n] / np.sqrt(query.shape[-1])
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if slopes is not None:
            logits = logits - float(slopes[n]) * distance[seen]
        weights = np.exp(logits - logits.max())
        mixed[b, t, n] = weights @ value[b, seen, k] / weights.sum()
    return mixed


def random_inputs(kv_heads, length, *, capacity=CAPACITY, dtype=jnp.float32, seed=0):
    """New tokens and a cache of `length` rows. Its unused rows hold huge values."""
    rng = np.random.default_rng((seed, kv_heads, length))

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32) * 1.5

    query, key, value = draw(B, T, N, H), draw(B, T, kv_heads, H), draw(B, T, kv_heads, H)
    # The same rows whatever the capacity.
    cached = np.full((2, ENTRIES, B, kv_heads, capacity, H), 1e30, np.float32)
    cached[..., :length, :] = draw(2, ENTRIES, B, kv_heads, length, H)
    # A third of the rows are gaps: padding or rejected drafts.
    is_token = rng.random((B, length)) < 2 / 3
    positions = np.full((B, capacity), -1, np.int32)
    positions[:, :length] = np.where(is_token, np.cumsum(is_token, axis=1) - 1, -1)
    own = np.asarray([[True, True, True], [False, True, True]])
    places = is_token.sum(axis=1, keepdims=True) + np.cumsum(own, axis=1) - 1
    query_positions = np.where(own, places, -1).astype(np.int32)
    arrays = [jnp.asarray(array, dtype) for array in (query, key, value, *cached)]
    return arrays, jnp.asarray(query_positions), jnp.asarray(positions)


@functools.partial(
    jax.jit,
    static_argnames=("window", "softcap", "has_alibi", "block", "lanes", "width", "sharder"),
)
def attend(
    arrays,
    query_positions,
    positions,
    length,
    key_positions=None,
    *,
    window=None,
    softcap=None,
    has_alibi=False,
    block=BLOCK,
    lanes=1,
    width=2 * H,
    entry=ENTRY,
    sharder=NO_MESH,
):
    query, key, value, cached_key, cached_value = arrays
    pairs = side_by_side(cached_key, cached_value, width)
    return cached_attention(
        query,
        key,
        value,
        query_positions,
        query_positions if key_positions is None else key_positions,
        CachedRows(pairs, entry, positions, length, block, lanes, sharder),
        window=window,
        terms=LogitTerms(softcap, alibi_slopes(N) if has_alibi else None),
    )


def wanted_of(
    arrays, query_positions, positions, length, key_positions=None, *,
    window=None, softcap=None, has_alibi=False,
):  # fmt: skip
    query, key, value, cached_key, cached_value = arrays
    own = query_positions if key_positions is None else key_positions

    def joined(cached, new):
        rows = cached[ENTRY, :, :, :length].transpose(0, 2, 1, 3)
        return np.concatenate((rows, new), axis=1)

    return reference(
        query,
        joined(cached_key, key),
        joined(cached_value, value),
        np.asarray(query_positions),
        np.concatenate((positions[:, :length], own), axis=1),
        window=window,
        softcap=softcap,
        slopes=np.asarray(alibi_slopes(N)) if has_alibi else None,
    )


@pytest.mark.parametrize(("kv_heads", "window", "softcap", "has_alibi"), OPTIONS)
def test_equals_the_definition(kv_heads, window, softcap, has_alibi):
    options = {"window": window, "softcap": softcap, "has_alibi": has_alibi}
    for length in LENGTHS:
        inputs = (*random_inputs(kv_heads, length), length)
        got = attend(*inputs, **options)
        np.testing.assert_allclose(
            got, wanted_of(*inputs, **options), atol=3e-6, err_msg=f"{length=}"
        )
        assert np.all(got[1, 0] == 0)  # Padding.


def test_all_rows_at_once_are_the_same():
    """Without a loop, for runtimes whose loops are slow; rows that are not used stay hidden."""
    kv_heads, window, softcap, has_alibi = OPTIONS[2]
    options = {"window": window, "softcap": softcap, "has_alibi": has_alibi}
    for length in (0, 65, 256):
        inputs = (*random_inputs(kv_heads, length), length)
        got = attend(*inputs, **options, block=0)
        np.testing.assert_allclose(got, attend(*inputs, **options), atol=2e-6)
        assert np.all(got[1, 0] == 0)
        assert "while" not in str(
            jax.make_jaxpr(functools.partial(attend, **options, block=0))(*inputs)
        )


@pytest.mark.parametrize("width", [2 * H, 4 * H], ids=["multiplied whole", "cut apart"])
def test_pairs_in_lanes_are_the_same(width):
    """As a TPU holds them; with one entry for all sequences, and with one for each."""
    inputs = (*random_inputs(2, 200), 200)
    mesh = Sharder(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4]))
    for entry in (ENTRY, jnp.asarray([1, 0])):
        wanted = attend(*inputs, window=130, entry=entry)
        for sharder in (NO_MESH, mesh):
            options = {"lanes": 2 * H, "width": width, "sharder": sharder}
            got = attend(*inputs, window=130, entry=entry, **options)
            np.testing.assert_allclose(got, wanted, atol=2e-6)
    # The second sequence has read another entry.
    assert np.abs(got - attend(*inputs, window=130))[1].max() > 1e-2


def test_bfloat16():
    arrays, query_positions, positions = random_inputs(2, 200, dtype=jnp.bfloat16)
    got = attend(arrays, query_positions, positions, 200, window=130, softcap=2.0)
    assert got.dtype == jnp.bfloat16
    wide = [array.astype(jnp.float32) for array in arrays]
    wanted = wanted_of(wide, query_positions, positions, 200, window=130, softcap=2.0)
    # The weights and the result are rounded to 8 bits.
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=2**-6)


def test_hidden_new_tokens_are_seen_by_none_but_may_ask():
    arrays, query_positions, positions = random_inputs(2, 65)
    key_positions = query_positions.at[0, 1].set(-1)
    inputs = (arrays, query_positions, positions, 65, key_positions)
    np.testing.assert_allclose(attend(*inputs), wanted_of(*inputs), atol=3e-6)
    assert np.abs(attend(*inputs) - attend(*inputs[:-1]))[0, 1:].max() > 1e-2


def test_a_token_without_anything_to_see_gets_zeros():
    arrays, query_positions, positions = random_inputs(2, 65)
    nothing = jnp.full_like(positions, -1), 65, jnp.full_like(query_positions, -1)
    assert np.all(attend(arrays, query_positions, *nothing) == 0)


@pytest.mark.parametrize("length", [1, 64, 200])
@pytest.mark.parametrize("window", [None, 10])
def test_unused_capacity_changes_no_bit(length, window):
    arrays, query_positions, positions = random_inputs(2, length)
    more, _, more_positions = random_inputs(2, length, capacity=1024)
    small = attend(arrays, query_positions, positions, length, window=window)
    large = attend(more, query_positions, more_positions, length, window=window)
    np.testing.assert_array_equal(small, large)


@pytest.mark.parametrize("lanes", [1, 2 * H])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e38])
def test_what_hidden_rows_hold_does_not_matter(garbage, lanes):
    """Gaps and unused rows can hold what a sequence left there that has run away."""
    arrays, query_positions, positions = random_inputs(2, 200)
    is_hidden = (positions < 0)[None, :, None, :, None]
    dirty = [jnp.where(is_hidden, garbage, array) for array in arrays[3:]]
    # Padding among the new tokens, too.
    new = [jnp.where((query_positions < 0)[..., None, None], garbage, a) for a in arrays[:3]]
    got = attend([*new, *dirty], query_positions, positions, 200, lanes=lanes)
    wanted = attend(arrays, query_positions, positions, 200, lanes=lanes)
    np.testing.assert_array_equal(got, wanted)


def test_blocks_that_no_query_reaches_are_not_read():
    """Below the window and above the length; what a window reaches is not skipped."""
    window = 10
    arrays, _, _ = random_inputs(2, CAPACITY)
    rows = jnp.arange(CAPACITY)
    for length in (64 + window - 2, 64 + window - 1, 64 + window, 200):
        query_positions = length + jnp.broadcast_to(jnp.arange(T), (B, T))
        lowest, last = (length - window + 1) // BLOCK, -(-length // BLOCK)
        is_read = (rows >= lowest * BLOCK) & (rows < last * BLOCK)
        # Rows of later blocks are visible as far as positions tell: who reads them gets NaN.
        places = jnp.where(rows < length, rows, jnp.where(is_read, -1, length - 1))
        positions = jnp.broadcast_to(places, (B, CAPACITY))
        poisoned = [jnp.where(is_read[:, None], array, jnp.nan) for array in arrays[3:]]
        clean = attend(arrays, query_positions, positions, length, window=window)
        got = attend([*arrays[:3], *poisoned], query_positions, positions, length, window=window)
        np.testing.assert_array_equal(got, clean)
        wanted = wanted_of(arrays, query_positions, positions, length, window=window)
        np.testing.assert_allclose(got, wanted, atol=3e-6)


def test_rows_do_not_depend_on_the_other_sequences():
    """A sequence of few tokens next to one that makes the loop begin and end elsewhere."""
    arrays, query_positions, positions = random_inputs(2, 200)
    few = positions.at[1].set(jnp.where(positions[1] < 5, positions[1], -1))
    far = jnp.stack((query_positions[0], jnp.asarray([5, 6, 7])))
    both = attend(arrays, far, few, 200, window=10)
    wanted = wanted_of(arrays, far, few, 200, window=10)
    np.testing.assert_allclose(both, wanted, atol=3e-6)


def test_the_size_of_blocks_changes_rounding_only():
    arrays, query_positions, positions = random_inputs(4, 200)
    small = attend(arrays, query_positions, positions, 200, block=8)
    large = attend(arrays, query_positions, positions, 200, block=256)
    np.testing.assert_allclose(small, large, atol=3e-6)


def test_large_logits_do_not_overflow():
    arrays, query_positions, positions = random_inputs(4, 65)
    arrays[0] = arrays[0] * 1e4
    inputs = (arrays, query_positions, positions, 65)
    np.testing.assert_allclose(attend(*inputs), wanted_of(*inputs), atol=1e-4)


def test_no_array_as_large_as_the_cache_is_made():
    """The compiled program takes blocks out of the cache and makes nothing of its size."""
    capacity = 1024
    (*new, cached_key, cached_value), own, positions = random_inputs(2, 200, capacity=capacity)

    @jax.jit
    def program(new, pairs, length):
        rows = CachedRows(pairs, ENTRY, positions, length, BLOCK)
        return cached_attention(*new, own, own, rows, window=130)

    pairs = side_by_side(cached_key, cached_value, 2 * H)
    text = program.lower(new, pairs, 200).compile().as_text()
    operations = {
        line.split("(")[0].split()[-1]
        for line in text.splitlines()
        if f",{capacity},{2 * H}]" in line.split(" = ")[-1].split("(")[0]
    }
    assert "parameter" in operations
    assert operations <= {"parameter", "get-tuple-element"}


# ------------------------------------------------------------------------------
# Blocks of their own.

# One long, several, and all; beyond a whole number of far blocks.
SPREADS = [[600, 3, 70, 0, 20, 64, 65, 1], [600, 580, 300, 0, 64, 65, 1, 2], [600] * 8]


@pytest.mark.parametrize("window", [None, 10, 400])
@pytest.mark.parametrize("lengths", SPREADS)
def test_sequences_read_their_own_blocks(lengths, window):
    rng, size, capacity = np.random.default_rng(0), len(lengths), 640
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    query, key, value = draw(size, 1, N, H), draw(size, 1, 2, H), draw(size, 1, 2, H)
    keys, values = draw(3, size, 2, capacity, H), draw(3, size, 2, capacity, H)
    rows, lengths = jnp.arange(capacity), jnp.asarray(lengths)
    positions = jnp.where(rows < lengths[:, None], rows, -1)
    slopes = alibi_slopes(N)

    @jax.jit
    def mix(entry, lengths):
        pairs = side_by_side(keys, values, 2 * H)
        cached = CachedRows(pairs, entry, positions, jnp.int32(600), 64, lengths=lengths)
        places = positions.max(axis=1, keepdims=True) + 1
        terms = LogitTerms(2.0, slopes)
        return cached_attention(
            query, key, value, places, places, cached, window=window, terms=terms
        )

    for entry in (1, jnp.asarray(rng.integers(0, 3, size))):
        wanted = mix(entry, None)
        np.testing.assert_allclose(mix(entry, lengths), wanted, atol=1e-6)
        # Whoever is not read does not matter.
        alone = jnp.where(jnp.arange(size) == 0, lengths, 0)
        np.testing.assert_allclose(mix(entry, alone)[0], wanted[0], atol=1e-6)


def test_far_blocks_are_read_by_those_that_reach_them_only():
    """A row that is not reached may hold anything."""
    lengths = jnp.asarray([500, 3, 4, 5, 6, 7, 8, 9])
    rows = jnp.arange(512)
    keys = jnp.where((rows < lengths[:, None])[None, :, None, :, None], 1.0, jnp.nan)
    keys = jnp.broadcast_to(keys, (1, 8, 2, 512, H))
    # Its position says that all of the first block can be seen.
    positions = jnp.where(rows < jnp.maximum(lengths, 64)[:, None], rows, -1)
    positions = jnp.where(jnp.arange(8)[:, None] == 0, positions, -1)
    pairs = side_by_side(keys, keys, 2 * H)
    cached = CachedRows(pairs, 0, positions, jnp.int32(500), 64, lengths=lengths)
    token = jnp.ones((8, 1, 2, H))
    mixed = cached_attention(token, token, token, lengths[:, None], lengths[:, None], cached)
    np.testing.assert_allclose(mixed, 1.0, atol=1e-6)
