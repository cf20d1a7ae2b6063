"""Which query may attend to which key, as data: the rules travel, the dense array is made late.

Row index: the place of a token in its row of the cache (or of the sequence, without a cache).
Query t of a call sits at row `query_offset + t`, key s at row s. A key is visible if ALL hold:

- valid: `key_row < query_offset + T`, so unused cache capacity is never seen, causal or not;
- causal (`is_causal`): `key_row <= query_row`;
- window (`window`): `query_row - key_row < window`. This bounds the past only: what lies ahead is
  the business of `is_causal`. A causal query sees itself and the `window - 1` rows before it;
- segments (`*_segment_ids`): both ids are equal and not 0. 0 is padding: it neither attends nor is
  attended to. A query that may attend to nothing gets exact zeros from `attention`.

Rows, not `Batch.positions`, decide: positions restart in each packed document, rows never do.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Attention rules that compose by AND; a pytree, so it passes through jit, scan and vmap.

    Attributes:
      is_causal: static; a query sees no later row.
      window: static; a query sees itself and `window - 1` rows before it. None: no limit.
      query_offset: row of the first query = cache length before this call. A Python int is static
        (each value recompiles, and fused kernels can use it); an int32 array [] or [B] is data.
      query_segment_ids: int32 [B, T], 0 is padding. Given together with the keys' or not at all.
      key_segment_ids: int32 [B, S].
    """

    # The data fields are Any because transformations fill them with shapes, axes and sentinels.
    is_causal: bool = True
    window: int | None = None
    query_offset: typing.Any = 0
    query_segment_ids: typing.Any = None
    key_segment_ids: typing.Any = None


def _flatten(mask: AttentionMask) -> tuple[tuple[typing.Any, ...], tuple[typing.Any, ...]]:
    """Splits off a Python-int offset as static, so that it survives jit, scan and remat."""
    segments = (mask.query_segment_ids, mask.key_segment_ids)
    if isinstance(mask.query_offset, int):
        return (None, *segments), (mask.is_causal, mask.window, mask.query_offset)
    return (mask.query_offset, *segments), (mask.is_causal, mask.window, None)


def _unflatten(static: tuple[typing.Any, ...], data: tuple[typing.Any, ...]) -> AttentionMask:
    is_causal, window, static_offset = static
    offset, query_ids, key_ids = data
    return AttentionMask(
        is_causal, window, offset if static_offset is None else static_offset, query_ids, key_ids
    )


jax.tree_util.register_pytree_node(AttentionMask, _flatten, _unflatten)


def check_mask(mask: AttentionMask, batch_size: int, query_length: int, key_length: int) -> None:
    """Raises ValueError if the mask does not fit queries [B, T] and keys [B, S]."""
    if mask.window is not None and mask.window < 1:
        raise ValueError(f"mask.window is {mask.window}; it must be at least 1, or None for all.")
    offset_shape = jnp.shape(mask.query_offset)
    if offset_shape not in ((), (batch_size,)):
        raise ValueError(
            f"mask.query_offset has shape {offset_shape}; give one number or one per sequence, "
            f"shape () or ({batch_size},)."
        )
    if isinstance(mask.query_offset, int) and not (
        0 <= mask.query_offset <= key_length - query_length
    ):
        raise ValueError(
            f"mask.query_offset is {mask.query_offset}, but {query_length} queries fit among "
            f"{key_length} keys only at offsets 0 .. {key_length - query_length}; "
            "make the cache longer or the input shorter."
        )
    if (mask.query_segment_ids is None) != (mask.key_segment_ids is None):
        given = "key" if mask.query_segment_ids is None else "query"
        raise ValueError(
            f"mask has only {given}_segment_ids; give both query_segment_ids and "
            "key_segment_ids, or neither."
        )
    for name, ids, length in (
        ("query_segment_ids", mask.query_segment_ids, query_length),
        ("key_segment_ids", mask.key_segment_ids, key_length),
    ):
        if ids is not None and jnp.shape(ids) != (batch_size, length):
            raise ValueError(
                f"mask.{name} has shape {jnp.shape(ids)}; it must be {(batch_size, length)}."
            )


def row_distance(
    query_offset: Int[Array, ""] | Int[Array, "B"] | int, query_length: int, key_length: int
) -> Int[Array, "#B T S"]:
    """query_row - key_row for every pair: positive where the key lies in the past."""
    offset = jnp.asarray(query_offset, jnp.int32).reshape(-1, 1, 1)
    query_rows = offset + jnp.arange(query_length, dtype=jnp.int32)[:, None]
    return query_rows - jnp.arange(key_length, dtype=jnp.int32)


def dense_mask(
    mask: AttentionMask, query_length: int, key_length: int
) -> Bool[Array, "#B T S"] | None:
    """The rules as an array, True where attention is allowed; [1, T, S] if rows do not differ.

    None if everything is visible: nothing is restricted and there is no unused capacity.
    """
    distance = row_distance(mask.query_offset, query_length, key_length)
    rules = []
    if mask.is_causal:
        rules.append(distance >= 0)
    elif not (
        isinstance(mask.query_offset, int) and mask.query_offset + query_length >= key_length
    ):
        # Distance to the last query, because later rows of this call may be seen.
        rules.append(distance[:, -1:, :] >= 0)
    if mask.window is not None:
        rules.append(distance < mask.window)
    if mask.query_segment_ids is not None and mask.key_segment_ids is not None:
        query_ids = mask.query_segment_ids[:, :, None]
        rules.append((query_ids == mask.key_segment_ids[:, None, :]) & (query_ids != 0))
    if not rules:
        return None
    allowed = rules[0]
    for rule in rules[1:]:
        allowed = allowed & rule
    return jnp.broadcast_to(allowed, (allowed.shape[0], query_length, key_length))


def zero_blind_rows(
    output: Float[Array, "B T N H"], mask: AttentionMask, key_length: int
) -> Float[Array, "B T N H"]:
    """Sets the output of queries that may attend to nothing to exact zeros.

    For kernels that give such rows arbitrary values. Only segments can blind a row: every other
    rule lets a query see at least itself.
    """
    has_segments = mask.query_segment_ids is not None
    allowed = dense_mask(mask, output.shape[1], key_length) if has_segments else None
    if allowed is None:
        return output
    sees_any = jnp.any(allowed, axis=-1)
    return jnp.where(sees_any[:, :, None, None], output, 0)
