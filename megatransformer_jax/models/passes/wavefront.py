"""One round of the parallel sampler: iterates a few positions of each sequence at once.

All positions of a round share every product with the weights, each at its own iteration. An
iteration therefore cannot read "its" slot of the cache: all read one slot, where the final tokens'
last keys and values stand. Among themselves they see what each offers in the same iteration.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.models.exit_criteria import Observation, exit_criterion
from megatransformer_jax.models.megatransformer import MegaTransformer, layer_context
from megatransformer_jax.models.passes.cached import (
    apply_coda,
    apply_head,
    apply_prelude,
    read_entries,
    token_states,
)
from megatransformer_jax.models.passes.depth_loop import stack_rows, with_cache
from megatransformer_jax.nn.context import NEW_ROWS, CachedPass, LayerContext
from megatransformer_jax.nn.kv_cache import KeyValues, KVCache
from megatransformer_jax.nn.layer_sharing import stack_owners
from megatransformer_jax.ops.masks import AttentionMask

_CHANGE = exit_criterion("latent_diff")


@struct.dataclass
class Refined:
    """What a round leaves.

    Attributes:
      state: the core's states.
      change: |h - h'| / |h|, h' being the state before the round.
      prelude: keys and values [layers, B, K, W, H].
      core: of each position's last iteration.
      coda: of the last states.
    """

    state: Float[Array, "B W D"]
    change: Float[Array, "B W"]
    prelude: KeyValues
    core: KeyValues
    coda: KeyValues


def refine(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B W"],
    positions: Int[Array, "B W"],
    iterations: Int[Array, "B W"],
    state: Float[Array, "B W D"],
    cache: KVCache,
    slot: Int[Array, ""],
    *,
    new_column: Int[Array, "B"] | None = None,
    state_keys: Key[Array, "B"] | None = None,
) -> tuple[Refined, Float[Array, "B W V"]]:
    """Iterates the core at several positions, then predicts the token behind each.

    Args:
      model: with a core.
      params: its parameters.
      tokens: at these positions; they may be wrong yet.
      positions: consecutive in each sequence, from the first that is not in the cache; -1 for
        columns without one.
      iterations: of each position in this round; those with fewer wait for the others.
      state: before the round.
      cache: of final tokens; only read.
      slot: the core's slot that all positions read.
      new_column: of each sequence, the position that begins and gets its first state from
        `recurrence.state_init`; a number outside for none. None: none in any sequence.
      state_keys: for first states, see `cached_forward`.

    Returns:
      What has changed, and logits of the token behind each position.

    Raises:
      ValueError: if first states are drawn at random and there are no keys.
    """
    config = model.config
    places = jnp.maximum(positions, 0)
    mask = AttentionMask(is_causal=True, window=config.attention.window)
    outer = layer_context(config, places, mask, config.width)

    def context_of(entries: KeyValues) -> LayerContext:
        rows = read_entries(entries, cache)
        return with_cache(outer, CachedPass(rows, positions, positions))

    x, prelude = apply_prelude(model, params, tokens, places, context_of(cache.prelude), cache)
    core_params, injected, prepared = cast(
        Any, model.apply({"params": params}, x, method="enter_core")
    )
    state = state.astype(injected.dtype)
    if new_column is not None:
        at = jnp.clip(new_column, 0, tokens.shape[1] - 1)[:, None]
        first = token_states(
            config,
            state_keys,
            jnp.take_along_axis(places, at, axis=1),
            jnp.take_along_axis(injected, at[..., None], axis=1),
        )
        is_new = jnp.arange(tokens.shape[1]) == new_column[:, None]
        state = jnp.where(is_new[..., None], first, state)
    new_state, core = _iterate(
        model, core_params, prepared, state, positions, iterations, places, mask, cache, slot
    )
    hidden, coda = apply_coda(model, params, new_state, context_of(cache.coda), cache)
    change, _ = _CHANGE.measure(state.astype(jnp.float32), Observation(new_state))
    logits = apply_head(model, params, hidden)
    return Refined(new_state, change, prelude, core, coda), logits


def _iterate(
    model: MegaTransformer,
    core_params: Any,
    prepared: jax.Array,
    state: jax.Array,
    positions: jax.Array,
    iterations: jax.Array,
    places: jax.Array,
    mask: AttentionMask,
    cache: KVCache,
    slot: jax.Array,
) -> tuple[jax.Array, KeyValues]:
    """The states after their iterations, and the keys and values of the last ones."""
    config, core = model.config, model.core_module()
    assert cache.core is not None
    layers = cache.core.key.shape[0] // cache.num_slots
    read = read_entries(cache.core, cache, slot * layers)
    inner = layer_context(config, places, mask, config.core_width)

    def iterate(index: jax.Array, carry: tuple[jax.Array, KeyValues]) -> Any:
        state, rows = carry
        is_active = index < iterations
        cached = CachedPass(read, positions, positions, is_active, rows)
        new_state, sown = core.apply(
            {"params": core_params}, state, prepared, with_cache(inner, cached), mutable=[NEW_ROWS]
        )
        state = jnp.where(is_active[..., None], cast(jax.Array, new_state), state)
        return state, stack_rows(sown[NEW_ROWS]["layers"], stack_owners(config, "core"))

    # A position without an iteration is none, and seen by nobody.
    batch_size, width = positions.shape
    key_shape = cache.core.key.shape
    nothing = jnp.zeros((layers, batch_size, key_shape[2], width, key_shape[-1]), prepared.dtype)
    carry = (state, KeyValues(nothing, nothing))
    done: tuple[jax.Array, KeyValues] = jax.lax.fori_loop(0, jnp.max(iterations), iterate, carry)
    return done
