"""Attention by the splash kernel (sparse flash attention in Pallas) on TPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    SplashAttentionKernel,
)
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from megatransformer_jax.ops.attention_exchange import gather_rows, swap_halves, swapped_rows
from megatransformer_jax.ops.masks import AttentionMask, zero_blind_rows
from megatransformer_jax.sharding.rules import Sharder

# Largest first: larger tiles make better use of the matrix unit, 512 still fits in VMEM.
TILE_SIZES = (512, 256, 128)


def attention_splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    logit_softcap: float | None = None,
    sharder: Sharder,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Softmax attention; see `ops.attention.attention` for the arguments.

    Tiles that causality or the window mask wholly are skipped. T, S and `mask.query_offset` (a
    Python int) must be multiples of 128. Where `sharder` cuts the rows, T must be a multiple of 128
    on each device, S = T and the offset 0; devices then gather each other's keys and values.
    `interpret` runs the kernel on any platform, slowly.
    """
    visible = mask.query_offset + query.shape[1]  # Beyond it lies unused cache capacity.
    key_ids = None if mask.key_segment_ids is None else mask.key_segment_ids[:, :visible]
    arrays = (query, key[:, :visible], value[:, :visible], mask.query_segment_ids, key_ids)
    make = functools.partial(_make_kernel, logit_softcap=logit_softcap, interpret=interpret)
    if sharder.ways("length") > 1:
        output = _attend_cut_rows(*arrays, mask=mask, make=make, sharder=sharder)
    else:
        local = functools.partial(_attend_whole_rows, mask=mask, make=make)
        if sharder.mesh is not None:
            # The compiler cannot partition a Pallas kernel, so each device calls it on its part.
            heads = sharder.rules.spec("batch", None, "heads", None)
            kv_heads = sharder.rules.spec("batch", None, "kv_heads", None)
            ids = sharder.rules.spec("batch", None)
            local = jax.shard_map(
                local,
                mesh=sharder.mesh,
                in_specs=(heads, kv_heads, kv_heads, ids, ids),
                out_specs=heads,
                check_vma=False,
            )
        output = local(*arrays)
    return zero_blind_rows(output, mask, key.shape[1])


def _attend_whole_rows(
    query: Array,
    key: Array,
    value: Array,
    query_ids: Array | None,
    key_ids: Array | None,
    *,
    mask: AttentionMask,
    make: Callable[..., SplashAttentionKernel],
) -> Array:
    """The kernel over the sequences and heads of one device."""
    query_length, num_heads = query.shape[1:3]
    kernel = make(_tile_mask(mask, query_length, key.shape[1]), num_heads, query_length)
    return _run(kernel, query, key, value, query_ids, key_ids)


def _attend_cut_rows(
    query: Array,
    key: Array,
    value: Array,
    query_ids: Array | None,
    key_ids: Array | None,
    *,
    mask: AttentionMask,
    make: Callable[..., SplashAttentionKernel],
    sharder: Sharder,
) -> Array:
    """Each device attends from its own rows, or as many others, to the keys of all rows.

    Under a causal mask devices swap halves of their queries first, where the halves have whole
    tiles. A window needs no swap: but for the first rows, all see as many keys.
    """
    rules, axes, ways = sharder.rules, sharder.rules.length, sharder.ways("length")
    length, num_heads = query.shape[1], query.shape[2] // sharder.ways("heads")
    block_rows = length // ways
    swaps = mask.is_causal and mask.window is None and block_rows % (2 * TILE_SIZES[-1]) == 0
    tile_mask = _tile_mask(mask, length, length, swapped_rows(length, ways) if swaps else None)
    block_rows = block_rows // 2 if swaps else block_rows
    if isinstance(tile_mask, splash.FullMask):  # All devices have the same one.
        kernel = make(splash.FullMask((block_rows, length)), num_heads, block_rows)
        tiles: Any = PartitionSpec()
    else:
        kernel = make(tile_mask, num_heads, block_rows, row_shards=ways)
        tiles = kernel.manual_sharding_spec(sharder.sharding(None, "length"))

    def local(
        kernel: SplashAttentionKernel,
        query: Array,
        key: Array,
        value: Array,
        query_ids: Array | None,
        key_ids: Array | None,
    ) -> Array:
        key, value = gather_rows(key, axes), gather_rows(value, axes)
        if not swaps:
            return _run(kernel, query, key, value, query_ids, key_ids)
        query = swap_halves(query, axes, ways)
        query_ids = None if query_ids is None else swap_halves(query_ids, axes, ways)
        return swap_halves(_run(kernel, query, key, value, query_ids, key_ids), axes, ways)

    heads = rules.spec("batch", "length", "heads", None)
    kv_heads = rules.spec("batch", "length", "kv_heads", None)
    ids, all_ids = rules.spec("batch", "length"), rules.spec("batch", None)
    return jax.shard_map(
        local,
        mesh=sharder.mesh,
        in_specs=(tiles, heads, kv_heads, kv_heads, ids, all_ids),
        out_specs=heads,
        check_vma=False,
    )(kernel, query, key, value, query_ids, key_ids)


def _run(
    kernel: SplashAttentionKernel,
    query: Array,
    key: Array,
    value: Array,
    query_ids: Array | None,
    key_ids: Array | None,
) -> Array:
    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    heads_first = [array.transpose(0, 2, 1, 3) for array in (scaled, key, value)]
    segments = (
        None if query_ids is None or key_ids is None else splash.SegmentIds(query_ids, key_ids)
    )
    output: Any = jax.vmap(kernel)(*heads_first, segments)
    return output.transpose(0, 2, 1, 3)


def _make_kernel(
    tile_mask: splash.Mask,
    num_heads: int,
    block_rows: int,
    *,
    logit_softcap: float | None,
    interpret: bool,
    row_shards: int = 1,
) -> SplashAttentionKernel:
    """A kernel for the heads of one device, whose tiles do not reach over `block_rows` rows."""
    return splash.make_splash_mha(
        splash.MultiHeadMask([tile_mask] * num_heads),
        block_sizes=_block_sizes(block_rows, tile_mask.shape[1]),
        attn_logits_soft_cap=logit_softcap,
        head_shards=1,
        q_seq_shards=row_shards,
        interpret=interpret,
    )


def _tile_mask(
    mask: AttentionMask, query_length: int, key_length: int, rows: np.ndarray | None = None
) -> splash.Mask:
    """The causal and window rules in the kernel's terms; `rows` numbers the queries if they are not
    in order."""
    window = key_length if mask.window is None else mask.window
    past = window - 1 if window < key_length else None
    future = 0 if mask.is_causal else None
    if past is None and future is None:
        return splash.FullMask((query_length, key_length))
    tiles = splash.LocalMask((query_length, key_length), (past, future), offset=mask.query_offset)
    if rows is not None:
        tiles.q_sequence = rows
    return tiles


def _block_sizes(query_length: int, key_length: int) -> splash.BlockSizes:
    rows = next(size for size in TILE_SIZES if query_length % size == 0)
    keys = next(size for size in TILE_SIZES if key_length % size == 0)
    return splash.BlockSizes(
        block_q=rows,
        block_kv=keys,
        block_q_dkv=rows,
        block_kv_dkv=keys,
        block_q_dq=rows,
        block_kv_dq=keys,
    )
