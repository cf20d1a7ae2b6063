"""Attention over rows that are cut over devices equals attention on one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import attend, attention_reference
from jax.sharding import Mesh

from megatransformer_jax.ops.attention_exchange import choose_exchange, swapped_rows
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import alibi_slopes
from megatransformer_jax.sharding.rules import MESH_AXES, Sharder

B, T, H = 2, 16, 4
SEGMENTS = np.arange(T)[None].repeat(B, 0) // [[7], [12]]  # 0 is padding.


def sharder_of(*sizes):
    return Sharder(Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), MESH_AXES))


def value_and_gradients(mask, sharder, **options):
    def attended(*arrays):
        return attend(*arrays, mask, sharder=sharder, **options)

    @jax.jit
    def run(arrays, pulled):
        output, pull = jax.vjp(attended, *arrays)
        return output, *pull(pulled)

    return run


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads", "exchange", "window"),
    [
        ((1, 2, 2, 2), 8, 4, "heads", None),
        ((1, 1, 1, 4), 4, 4, "heads", 5),
        ((1, 2, 2, 2), 4, 2, "keys", 5),
        ((1, 1, 1, 4), 3, 3, "keys", None),
    ],
)
def test_cut_rows_equal_the_definition_and_one_device_in_gradient(
    sizes, heads, kv_heads, exchange, window
):
    keys = jax.random.split(jax.random.key(0), 4)
    *arrays, pulled = [
        jax.random.normal(key, (B, T, number, H))
        for key, number in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    ]
    ids = jnp.asarray(SEGMENTS, jnp.int32)
    mask = AttentionMask(window=window, query_segment_ids=ids, key_segment_ids=ids)
    options = {"logit_softcap": 2.0, "alibi_slopes": alibi_slopes(heads)}
    sharder = sharder_of(*sizes)
    assert choose_exchange(sharder, T, T, kv_heads) == exchange
    names = ("heads", "kv_heads", "kv_heads", "heads")
    placed = [
        jax.device_put(array, sharder.sharding("batch", "length", name, None))
        for array, name in zip((*arrays, pulled), names, strict=True)
    ]
    run = value_and_gradients(mask, sharder, **options)
    results = run(placed[:3], placed[3])
    assert results[0].sharding.is_equivalent_to(placed[0].sharding, 4)
    expected = attention_reference(
        *arrays,
        window=window,
        query_ids=SEGMENTS,
        key_ids=SEGMENTS,
        softcap=2.0,
        slopes=options["alibi_slopes"],
    )
    np.testing.assert_allclose(results[0], expected, atol=1e-5)
    alone = value_and_gradients(mask, Sharder(), **options)(arrays, pulled)
    for ours, theirs in zip(results, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    text = run.lower(placed[:3], placed[3]).compile().as_text()
    assert ("all-to-all" in text) == (exchange == "heads")
    # Only ids are gathered if heads are exchanged.
    gathered = [line for line in text.splitlines() if "f32" in line and " all-gather(" in line]
    assert bool(gathered) == (exchange == "keys")


def test_keys_and_their_gradients_travel_in_the_arrays_type():
    sharder = sharder_of(1, 1, 1, 4)
    shapes = [
        jax.ShapeDtypeStruct((B, T, 3, H), jnp.bfloat16, sharding=sharder.sharding(*names))
        for names in [("batch", "length", None, None)] * 4
    ]
    run = value_and_gradients(AttentionMask(), sharder)
    text = run.lower(shapes[:3], shapes[3]).as_text()
    for exchange in ("all_gather", "reduce_scatter"):
        sent = re.findall(rf'"stablehlo\.{exchange}".*?: \((tensor<[^>]*>)\) ->', text, re.DOTALL)
        assert len(sent) == 2 and all(shape.endswith("xbf16>") for shape in sent), exchange


def test_dropout_does_not_depend_on_how_heads_are_laid_out():
    array = jax.random.normal(jax.random.key(0), (B, T, 4, H))
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(1)}
    outputs = [
        attend(array, array, array, AttentionMask(), sharder=sharder, **options)
        for sharder in (Sharder(), sharder_of(1, 1, 2, 2))
    ]
    np.testing.assert_allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "kv_heads", "exchange"),
    [
        ((8, 8), 8, "heads"),
        ((8, 8), 6, "keys"),
        ((8, 8), 2, "keys"),
        ((6, 8), 8, "keys"),
        ((8, 9), 8, "keys"),
    ],
)
def test_heads_are_exchanged_where_they_and_rows_divide(lengths, kv_heads, exchange):
    assert choose_exchange(sharder_of(1, 1, 2, 4), *lengths, kv_heads) == exchange
    assert choose_exchange(sharder_of(2, 2, 2, 1), *lengths, kv_heads) == "none"


@pytest.mark.parametrize("ways", [2, 3, 4, 8])
def test_after_the_swap_all_devices_see_as_many_keys(ways):
    rows = swapped_rows(12 * ways, ways)
    assert sorted(rows) == list(range(12 * ways))
    seen = (rows + 1).reshape(ways, -1).sum(axis=1)
    assert len(set(seen)) == 1
    assert len(set((np.arange(12 * ways) + 1).reshape(ways, -1).sum(axis=1))) == ways
