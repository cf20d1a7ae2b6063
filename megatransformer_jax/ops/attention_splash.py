"""Attention by the splash kernel (sparse flash attention in Pallas) on TPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float

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
    Python int) must be multiples of 128. `interpret` runs the kernel on any platform, slowly.
    """
    visible = mask.query_offset + query.shape[1]  # Beyond it lies unused cache capacity.
    key_ids = None if mask.key_segment_ids is None else mask.key_segment_ids[:, :visible]
    local = functools.partial(
        _local_attention, mask=mask, logit_softcap=logit_softcap, interpret=interpret
    )
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
    output = local(query, key[:, :visible], value[:, :visible], mask.query_segment_ids, key_ids)
    return zero_blind_rows(output, mask, key.shape[1])


def _local_attention(
    query: Array,
    key: Array,
    value: Array,
    query_ids: Array | None,
    key_ids: Array | None,
    *,
    mask: AttentionMask,
    logit_softcap: float | None,
    interpret: bool,
) -> Array:
    """The kernel over the sequences and heads of one device."""
    query_length, num_heads, width = query.shape[1:]
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_tile_mask(mask, query_length, key.shape[1])] * num_heads),
        block_sizes=_block_sizes(query_length, key.shape[1]),
        attn_logits_soft_cap=logit_softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    scaled = (query.astype(jnp.float32) * width**-0.5).astype(query.dtype)
    heads_first = [array.transpose(0, 2, 1, 3) for array in (scaled, key, value)]
    segments = (
        None if query_ids is None or key_ids is None else splash.SegmentIds(query_ids, key_ids)
    )
    return jax.vmap(kernel)(*heads_first, segments).transpose(0, 2, 1, 3)


def _tile_mask(mask: AttentionMask, query_length: int, key_length: int) -> splash.Mask:
    """The causal and window rules in the kernel's terms."""
    past = None if mask.window is None else mask.window - 1
    future = 0 if mask.is_causal else None
    if past is None and future is None:
        return splash.FullMask((query_length, key_length))
    return splash.LocalMask((query_length, key_length), (past, future), offset=mask.query_offset)


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
