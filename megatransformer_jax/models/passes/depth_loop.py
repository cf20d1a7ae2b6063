"""Iterates the core over new tokens with a cache; every token leaves on its own.

The loop ends when all tokens have left or the depth is reached. Both depth and threshold are data,
so one compilation serves all. A token that has left keeps its state; tokens that read it at a
greater depth see its keys and values as `KVCache.exited_reads` says, within this pass just as from
the cache later. So the result does not depend on which tokens share a pass: all at once, in chunks
or one by one.

There are two exceptions. With an exit criterion that needs logits, in a pass of several tokens, the
coda that judges a token sees its neighbours at their present iteration, not at their last. With
fewer slots than iterations, tokens of one pass see each other at the same iteration, those of
earlier passes as they left the slot. `generation.prefill` has the rule for prompts.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.models.core import Pass, at_iteration
from megatransformer_jax.models.exit_criteria import ExitCriterion, Observation
from megatransformer_jax.models.gate_readout import (
    Reading,
    begin_reading,
    finish_reading,
    read_iteration,
)
from megatransformer_jax.nn.context import NEW_ROWS, CachedPass, LayerContext
from megatransformer_jax.nn.kv_cache import KVCache, slot_for, visible_positions
from megatransformer_jax.nn.layer_sharing import earlier_uses, stack_owners
from megatransformer_jax.ops.cached_attention import CachedRows

_FIXED = "fixed"


@struct.dataclass
class DepthResult:
    """What the loop leaves.

    Attributes:
      state: the core's last state of each token.
      read: what coda and head read; the same, unless the rule has a read-out.
      rows: pairs for the cache.
      num_steps: iterations that each token took; 0 for padding.
      memory: what the rule's criterion keeps of the last iteration.
    """

    state: Float[Array, "B T D"]
    read: Float[Array, "B T D"]
    rows: Float[Array, "E B K T P"]
    num_steps: Int[Array, "B T"]
    memory: Any = None


@struct.dataclass
class LoopState:
    """Where the loop is.

    Attributes:
      iteration: how many have been done.
      state: the core's state of each token.
      rows: pairs for the cache, of the slots that have been reached.
      is_active: tokens that iterate on.
      num_steps: iterations of each token so far.
      memory: of the rule's criterion.
      reading: of the rule's read-out.
    """

    iteration: Int[Array, ""]
    state: Float[Array, "B T D"]
    rows: Float[Array, "E B K T P"]
    is_active: Bool[Array, "B T"]
    num_steps: Int[Array, "B T"]
    memory: Any
    reading: Reading | None


def begin_loop(core: Pass, state: Float[Array, "B T D"]) -> LoopState:
    """The loop before its first turn; `core` as of `run_loop`."""
    cache, rule, cached = core.cache, core.rule, core.context.cached
    assert cache is not None and cache.core is not None and rule is not None and cached is not None
    positions = cached.query_positions
    empty = no_rows(core, cache.core.shape[0], state.shape[1])
    return LoopState(
        iteration=jnp.int32(0),
        state=state,
        rows=core.core.sharder.constrain(empty, None, "batch", "kv_heads", None, None),
        is_active=positions >= 0,
        num_steps=jnp.zeros(positions.shape, jnp.int32),
        memory=rule.criterion.init(state, core.core.config.vocab_size),
        reading=begin_reading(rule.readout, state),
    )


def run_loop(
    core: Pass,
    begun: LoopState,
    logits_of: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    gate_of: Callable[[Float[Array, "B T D"]], Float[Array, "B T"]],
    end: Int[Array, ""] | None = None,
) -> LoopState:
    """Runs the loop until every token has left.

    Args:
      core: with a cache and a rule. Its context's `cached` says what is new and what is read.
      begun: where the loop is.
      logits_of: coda and head, for criteria that need logits.
      gate_of: the exit gate's logits, for the criterion and the read-outs that need it.
      end: stops before this iteration. None: does not.
    """
    cache, rule = core.cache, core.rule
    assert cache is not None and cache.core is not None and rule is not None
    assert core.context.cached is not None
    positions = core.context.cached.query_positions
    differ, criterion, layers = rule.lets_tokens_differ, rule.criterion, core_layers(cache)

    def context_at(carry: LoopState, slot: Any) -> LayerContext:
        visible, frozen = positions, None
        if differ:
            frozen = _frozen_rows(carry, cache, slot, layers)
        if differ and cache.exited_reads == "skip":
            visible = jnp.where(carry.is_active | (carry.num_steps > slot), positions, -1)
        cached: Any = core.context.cached
        active = carry.is_active if differ else None
        return with_cache(
            core.context,
            cached.replace(
                rows=read_slot(cache, slot, layers),
                key_positions=visible,
                is_active=active,
                frozen=frozen,
            ),
        )

    def goes_on(carry: LoopState) -> jax.Array:
        is_active = jnp.any(carry.is_active)
        return is_active if end is None else is_active & (carry.iteration < end)

    def body(carry: LoopState) -> LoopState:
        slot = slot_for(carry.iteration, cache.num_slots, cache.sharing)
        context = context_at(carry, slot)
        new_state, new_rows = iterate_and_sow(core, carry.state, context, carry.iteration)
        rows = _put_slot(carry.rows, new_rows, _entry_to_write(core, slot * layers, new_state))
        is_active, memory = carry.is_active, carry.memory
        if differ:
            new_state = jnp.where(is_active[..., None], new_state, carry.state)
        num_steps, reading = carry.num_steps + is_active, carry.reading
        if reading is not None:
            stops = gate_of(new_state)
            reading = read_iteration(rule.readout, reading, new_state, stops, is_active)
        if criterion.name != _FIXED:
            logits = _logits_for(criterion, logits_of, new_state)
            gate = gate_of(new_state) if criterion.needs_gate else None
            value, memory = criterion.measure(memory, Observation(new_state, logits, gate))
            may_leave = carry.iteration + 1 >= _per_sequence(rule.min_depth)
            is_active &= ~(criterion.is_settled(value, rule.threshold) & may_leave)
        is_active &= carry.iteration + 1 < _per_sequence(rule.depth)
        return LoopState(
            carry.iteration + 1, new_state, rows, is_active, num_steps, memory, reading
        )

    done: LoopState = jax.lax.while_loop(goes_on, body, begun)
    return done


def end_loop(core: Pass, done: LoopState) -> DepthResult:
    """What the loop leaves once every token has left."""
    assert core.cache is not None and core.rule is not None
    rows = _fill_unused_slots(done.rows, done.iteration, core_layers(core.cache))
    read = finish_reading(core.rule.readout, done.reading, done.state)
    return DepthResult(done.state, read, rows, done.num_steps, done.memory)


def iterate_and_sow(
    core: Pass,
    state: Float[Array, "B T D"],
    context: LayerContext,
    iteration: Int[Array, ""] | Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Float[Array, "L B K T P"]]:
    """One iteration in another context: the next state, and the core's new rows for the cache."""
    context = at_iteration(core.core.config, context, iteration)
    new_state, sown = core.core.apply(
        {"params": core.params}, state, core.prepared, context, mutable=[NEW_ROWS]
    )
    rows = stack_rows(sown[NEW_ROWS]["layers"], stack_owners(core.core.config, "core"))
    return cast(jax.Array, new_state), rows


def _logits_for(
    criterion: ExitCriterion, logits_of: Callable[[jax.Array], jax.Array], state: jax.Array
) -> jax.Array | None:
    """What the criterion reads of the output; zeros where this run does not read it."""
    if not criterion.needs_logits:
        return None
    if criterion.reads_logits is None:
        return logits_of(state)
    shape = jax.eval_shape(logits_of, state)
    logits: jax.Array = jax.lax.cond(
        criterion.reads_logits,
        logits_of,
        lambda state: jnp.zeros(shape.shape, shape.dtype),
        state,
    )
    return logits


def core_layers(cache: KVCache) -> int:
    """Layers of the core; the cache has an entry for each in every slot."""
    assert cache.core is not None
    return int(cache.core.shape[0] // cache.num_slots)


def no_rows(core: Pass, entries: int, num_columns: int) -> Float[Array, "E B K T P"]:
    """Zeros in the shape of `entries` layers' new pairs at so many columns."""
    assert core.cache is not None and core.cache.core is not None
    shape, batch_size = core.cache.core.shape, core.prepared.shape[0]
    rows = (entries, batch_size, shape[2], num_columns, shape[-1])
    return jnp.zeros(rows, core.prepared.dtype)


def stack_rows(sown: Any, owners: tuple[int, ...]) -> Float[Array, "L B K T P"]:
    """The pairs that a stack's layers have sown.

    Args:
      sown: by the layers' weights.
      owners: the weights of each layer (nn/layer_sharing.py).
    """
    # `sow` collects into tuples: weights that several layers share have one entry for each.
    each = [
        sown[f"layer_{owner}"]["attention"]["pairs"][use]
        for owner, use in zip(owners, earlier_uses(owners), strict=True)
    ]
    return jnp.stack(each)


def with_cache(context: LayerContext, cached: CachedPass) -> LayerContext:
    """The context with a cache, whose first pass sees the chunk through the mask's segments."""
    replaced: Any = context
    if cached.is_first:
        mask = replaced.mask
        keys = (cached.key_positions >= 0).astype(jnp.int32)
        queries = (cached.query_positions >= 0).astype(jnp.int32)
        mask = type(mask)(mask.is_causal, mask.window, 0, queries, keys)
        replaced = replaced.replace(mask=mask)
    updated: LayerContext = replaced.replace(cached=cached)
    return updated


def read_slot(cache: KVCache, slot: Any, layers: int) -> CachedRows:
    """The core's entries as the iteration of a slot reads them: one slot for all, or one each."""
    assert cache.core is not None
    return CachedRows(
        cache.core,
        slot * layers,
        visible_positions(cache, slot),
        cache.length,
        cache.block_rows,
        cache.lanes,
        sequence=cache.sequence,
    )


def _frozen_rows(carry: LoopState, cache: KVCache, slot: Any, layers: int) -> jax.Array:
    """What tokens that have left offer in this iteration.

    While slots are used for the first time: what they offered one iteration ago, so their latest.
    Later: what their slot holds.
    """
    previous = slot_for(carry.iteration - 1, cache.num_slots, cache.sharing)
    source = jnp.where(carry.iteration < cache.num_slots, jnp.maximum(previous, 0), slot)
    return jax.lax.dynamic_slice_in_dim(carry.rows, source * layers, layers)


def _entry_to_write(core: Pass, entry: jax.Array, new_state: jax.Array) -> jax.Array:
    """The entry, known after those of tokens that have left were read from the same arrays.

    On a mesh it is not worth it: devices would tell each other in every iteration.
    """
    assert core.rule is not None
    if not core.rule.lets_tokens_differ or core.core.sharder.mesh is not None:
        return entry
    return known_after(entry, new_state)


def known_after(index: jax.Array, array: jax.Array) -> jax.Array:
    """The index, in a form that XLA can compute only when it has the array.

    What is updated in place must be written after everything that reads it. Otherwise XLA may write
    a layer's rows, which are known early, before the layer has read the others, and copies all to
    be able to. An optimisation barrier is gone by the time that XLA orders the two.
    """
    is_nan = jnp.isnan(array.ravel()[0]).astype(index.dtype)
    return index + jnp.minimum(is_nan, 0)


def _put_slot(rows: jax.Array, new: jax.Array, entry: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, new.astype(rows.dtype), entry, axis=0)


def _fill_unused_slots(rows: jax.Array, num_iterations: jax.Array, layers: int) -> jax.Array:
    """Slots that no iteration reached hold what the last one offered."""
    num_slots = rows.shape[0] // layers
    last = jax.lax.dynamic_slice_in_dim(rows, (num_iterations - 1) * layers, layers)

    def fill(slot: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, last, slot * layers, axis=0)

    # A loop of no turns, if all were reached, where a selection would move all rows twice.
    filled: jax.Array = jax.lax.fori_loop(num_iterations, num_slots, fill, rows)
    return filled


def _per_sequence(number: jax.Array) -> jax.Array:
    """[] as it is, [B] as [B, 1], to broadcast over tokens."""
    return number[:, None] if jnp.ndim(number) else number
