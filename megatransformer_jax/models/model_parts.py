"""The parts of a model outside its core, applied to new tokens with a cache."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.depth_loop import stack_rows
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.nn.context import NEW_ROWS, LayerContext
from megatransformer_jax.nn.kv_cache import KeyValues, KVCache
from megatransformer_jax.nn.layer_sharing import stack_owners
from megatransformer_jax.ops.cached_attention import CachedRows


def apply_prelude(
    model: MegaTransformer,
    params: Any,
    tokens: jax.Array,
    places: jax.Array,
    context: LayerContext,
    cache: KVCache,
) -> tuple[jax.Array, KeyValues]:
    """Embedding and prelude of tokens [B, T]: [B, T, D], and the rows for the cache."""
    x, sown = _apply(model, params, tokens, places, context, method="run_prelude")
    return x, _rows_of(model.config, sown, "prelude", cache.prelude, x)


def apply_coda(
    model: MegaTransformer, params: Any, state: jax.Array, context: LayerContext, cache: KVCache
) -> tuple[jax.Array, KeyValues]:
    """The coda's output [B, T, D] from the core's state, and the rows for the cache."""
    (_, hidden), sown = _apply(model, params, state, context, method="run_coda")
    return hidden, _rows_of(model.config, sown, "coda", cache.coda, hidden)


def apply_head(model: MegaTransformer, params: Any, hidden: jax.Array) -> jax.Array:
    """Logits [B, T, V], float32, from the coda's output."""
    return cast(jax.Array, model.apply({"params": params}, hidden, method="run_head"))


def read_entries(entries: KeyValues, cache: KVCache, first: jax.Array | int = 0) -> CachedRows:
    """The cache as a stack's layers read it; `first` is the entry of the first layer."""
    return CachedRows(
        entries.key, entries.value, first, cache.positions, cache.length, cache.block_rows
    )


def read_prelude(cache: KVCache) -> CachedRows:
    """The cache as the text's prelude reads it: places of media are none of its own."""
    rows: Any = read_entries(cache.prelude, cache)
    if cache.is_medium is None:
        return cast(CachedRows, rows)
    positions = jnp.where(cache.is_medium, -1, cache.positions)
    return cast(CachedRows, rows.replace(positions=positions))


def _apply(
    model: MegaTransformer, params: Any, *arguments: Any, method: str
) -> tuple[Any, dict[str, Any]]:
    result, sown = cast(
        Any, model.apply({"params": params}, *arguments, method=method, mutable=[NEW_ROWS])
    )
    return result, sown.get(NEW_ROWS, {})


def _rows_of(
    config: ModelConfig, sown: dict[str, Any], stack: str, entries: KeyValues, x: jax.Array
) -> KeyValues:
    """A stack's new rows; of no layers if it has none."""
    if stack in sown:
        return stack_rows(sown[stack], stack_owners(config, stack))
    shape = (0, *entries.key.shape[1:3], x.shape[1], entries.key.shape[-1])
    return KeyValues(jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype))
