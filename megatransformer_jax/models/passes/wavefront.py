"""One round of the parallel sampler: iterates a few positions of each sequence at once.

All positions of a round share every product with the weights, each at its own iteration. An
iteration therefore cannot read "its" slot of the cache: all read one slot, where the final tokens'
last keys and values stand. Among themselves they see what each offers in the same iteration.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.models.core import Pass
from megatransformer_jax.models.exit_criteria import Observation, exit_criterion
from megatransformer_jax.models.megatransformer import (
    MegaTransformer,
    layer_context,
    open_pass,
    with_values,
)
from megatransformer_jax.models.passes.cached import (
    apply_coda,
    apply_head,
    apply_prelude,
    read_entries,
    read_prelude,
    token_states,
)
from megatransformer_jax.models.passes.depth_loop import (
    core_layers,
    iterate_and_sow,
    no_rows,
    with_cache,
)
from megatransformer_jax.nn.context import CachedPass, LayerContext
from megatransformer_jax.nn.kv_cache import KVCache, NewPairs
from megatransformer_jax.ops.cached_attention import CachedRows
from megatransformer_jax.ops.masks import AttentionMask

_CHANGE = exit_criterion("latent_diff")


@struct.dataclass
class Refined:
    """What a round leaves.

    Attributes:
      state: the core's states.
      change: |h - h'| / |h|, h' being the state before the round.
      rows: pairs of W new tokens; those of the core are of each position's last iteration, those of
        the coda of the last states.
    """

    state: Float[Array, "B W D"]
    change: Float[Array, "B W"]
    rows: NewPairs


@struct.dataclass
class Columns:
    """The positions of a round.

    Attributes:
      tokens: at these positions; they may be wrong yet.
      positions: consecutive in each sequence, from the first that is not in the cache; -1 for
        columns without one.
      iterations: of each position in this round; those with fewer wait for the others.
      done: of each position before this round.
      state: before the round.
      new_column: of each sequence, the position that begins and gets its first state from
        `recurrence.state_init`; a number outside for none. None: none in any sequence.
    """

    tokens: Int[Array, "B W"]
    positions: Int[Array, "B W"]
    iterations: Int[Array, "B W"]
    done: Int[Array, "B W"]
    state: Float[Array, "B W D"]
    new_column: Int[Array, "B"] | None = None


def refine(
    model: MegaTransformer,
    params: Any,
    columns: Columns,
    cache: KVCache,
    slot: Int[Array, ""],
    state_keys: Key[Array, "B"] | None = None,
) -> tuple[Refined, Float[Array, "B W V"]]:
    """Iterates the core at several positions, then predicts the token behind each.

    Args:
      model: with a core.
      params: its parameters.
      columns: what is iterated.
      cache: of final tokens; only read.
      slot: the core's slot that all positions read.
      state_keys: for first states, see `NewTokens`.

    Returns:
      What has changed, and logits of the token behind each position.

    Raises:
      ValueError: if first states are drawn at random and there are no keys.
    """
    positions = columns.positions
    places = jnp.maximum(positions, 0)
    mask = AttentionMask(is_causal=True, window=model.config.attention.window)
    outer = layer_context(model.config, places, mask, model.config.width)
    outer = with_values(model, params, outer, columns.tokens)

    def reading(context: LayerContext, rows: CachedRows) -> LayerContext:
        return with_cache(context, CachedPass(rows, positions, positions))

    prelude_context = reading(outer, read_prelude(cache))
    x, prelude = apply_prelude(model, params, columns.tokens, places, prelude_context, cache)
    assert cache.core is not None
    inner = layer_context(model.config, places, mask, model.config.core_width)
    inner = dataclasses.replace(inner, value_embeddings=outer.value_embeddings)
    inner = reading(inner, read_entries(cache.core, cache, slot * core_layers(cache)))
    core = open_pass(model, params, x, inner)
    core = core.replace(cache=cache)  # type: ignore[attr-defined]
    state = columns.state.astype(core.injected.dtype)
    if columns.new_column is not None:
        state = _begin(core, columns.new_column, state, places, state_keys)
    new_state, core_rows = _iterate(core, state, columns)
    outer = reading(outer, read_entries(cache.coda, cache))
    hidden, coda = apply_coda(model, params, new_state, outer, cache)
    change, _ = _CHANGE.measure(state.astype(jnp.float32), Observation(new_state))
    logits = apply_head(model, params, hidden)
    return Refined(new_state, change, (prelude, core_rows, coda)), logits


def _begin(
    core: Pass,
    new_column: jax.Array,
    state: jax.Array,
    places: jax.Array,
    state_keys: jax.Array | None,
) -> jax.Array:
    """The states, with first ones at the positions that begin."""
    at = jnp.clip(new_column, 0, places.shape[1] - 1)[:, None]
    first = token_states(
        core.core.config,
        state_keys,
        jnp.take_along_axis(places, at, axis=1),
        jnp.take_along_axis(core.injected, at[..., None], axis=1),
    )
    is_new = jnp.arange(places.shape[1]) == new_column[:, None]
    return jnp.where(is_new[..., None], first, state)


def _iterate(core: Pass, state: jax.Array, columns: Columns) -> tuple[jax.Array, jax.Array]:
    """The states after their iterations, and the keys and values of the last ones."""
    assert core.cache is not None
    iterations = columns.iterations

    def iterate(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> Any:
        state, rows = carry
        is_active = index < iterations
        cached: Any = core.context.cached
        cached = cached.replace(is_active=is_active, frozen=rows)
        context, number = with_cache(core.context, cached), columns.done + index
        new_state, rows = iterate_and_sow(core, state, context, number)
        return jnp.where(is_active[..., None], new_state, state), rows

    # A position without an iteration is none, and seen by nobody.
    nothing = no_rows(core, core_layers(core.cache), state.shape[1])
    carry = (state, nothing)
    done: tuple[jax.Array, jax.Array] = jax.lax.fori_loop(0, jnp.max(iterations), iterate, carry)
    return done
