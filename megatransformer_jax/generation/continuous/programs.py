"""What a batch of texts at the grain of an iteration computes: pure functions of static shapes.

| program | does                                                            | keys and values   |
|---------|-----------------------------------------------------------------|-------------------|
| place   | a text's settings and prompt into a row                         | not touched       |
| copy    | a row's first tokens from another row                           | written, in place |
| advance | iterations of the core, until enough rows wait                  | only read         |
| turn    | rows that wait: coda, head, a new token, prelude of the next    | written, in place |
| step    | advance and turn, some times in a row                           | written, in place |
| release | frees rows                                                      | not touched       |

Those that read prompts are in `reading`. The last token of a prompt is not read beforehand: it
enters its row as a new token does. So there is no program for first tokens, and a prompt of one
token needs no reading.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from megatransformer_jax.generation.continuous.lanes import (
    BatchShape,
    DeviceEvents,
    Events,
    Lanes,
    RowSettings,
)
from megatransformer_jax.generation.endings import EXHAUSTED, RUNNING, Ending, EndState, exhaust
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.placement import constrain_rows, for_rows
from megatransformer_jax.generation.processors.row_chain import RowChain, neutral_rows
from megatransformer_jax.generation.token_choice import choose, top_log_probs
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.models.passes.depth_loop import known_after
from megatransformer_jax.models.passes.tick import (
    FirstStates,
    RowRules,
    begin_tokens,
    empty_core_rows,
    finish_tokens,
    iterate_tokens,
    select_rows,
)
from megatransformer_jax.nn.cache_sequences import (
    copy_rows,
    with_positions,
    write_tokens,
)
from megatransformer_jax.nn.kv_cache import CacheShape, KVCache, constrain_cache, init_cache


@struct.dataclass
class Batch:
    """All that changes: what `turn` and the others take and give back, donated."""

    lanes: Lanes
    cache: KVCache


def empty_batch(model: MegaTransformer, shape: BatchShape, params: Any) -> Batch:
    """No text in any row."""
    config, num_rows = model.config, shape.rows
    model = for_rows(model, num_rows)
    cache_shape = CacheShape(
        num_rows,
        shape.capacity,
        shape.num_slots,
        model.policy.compute,
        model.platform,
        shape.sharing,
        shape.exited_reads,
        shape.with_images,
        model.sharder.num_heads(config.attention.kv_heads),
    )
    cache = constrain_cache(model.sharder, init_cache(config, cache_shape))
    zeros = jnp.zeros((num_rows,), jnp.int32)
    nothing = jnp.zeros((num_rows,), bool)
    settings = RowSettings(
        RowRules(zeros + 1, zeros + 1, jnp.zeros((num_rows,)), zeros),
        neutral_rows(num_rows, shape.sizes),
        nothing,
        zeros + 1,
        zeros,
        jnp.zeros((num_rows,), jnp.uint32),
        zeros,
        zeros,
        zeros + 1,
    )
    first = FirstStates(settings.row_keys(), jnp.zeros((num_rows, 1, _state_width(model))), nothing)
    tokens = begin_tokens(model, params, zeros, zeros - 1, cache, first, shape.choice)
    # Of which nothing is computed but the shapes.
    tokens = jax.tree.map(jnp.zeros_like, tokens)
    tokens = changed(tokens, positions=zeros - 1, core=empty_core_rows(cache))
    history = History(jnp.zeros((num_rows, cache.capacity), jnp.int32), zeros, zeros)
    counts = jnp.zeros((num_rows, config.vocab_size), jnp.int32)
    lanes = Lanes(settings, history, counts, tokens, nothing, nothing, jnp.int32(0))
    return constrained(model, lanes, cache)


def place(
    model: MegaTransformer,
    shape: BatchShape,
    batch: Batch,
    row: Int[Array, ""],
    settings: RowSettings,
    prompt: Int[Array, "C"],
    length: Int[Array, ""],
) -> Batch:
    """A text in a row, whatever was there; nothing of its prompt has been read.

    Args:
      model: the model.
      shape: of the batch.
      batch: before.
      row: which.
      settings: of one row, without the axis B.
      prompt: its ids, padded.
      length: how many they are.
    """
    lanes, cache = batch.lanes, batch.cache
    one = History(prompt[None], length[None], length[None])

    def put(all_rows: jax.Array, own: Any) -> jax.Array:
        return all_rows.at[row].set(own)

    chain = RowChain(lanes.settings.numbers, None, model.config.vocab_size)
    lanes = changed(
        lanes,
        settings=jax.tree.map(put, lanes.settings, settings),
        history=jax.tree.map(lambda all, own: put(all, own[0]), lanes.history, one),
        counts=put(lanes.counts, chain.init(one)[0]),
        is_reading=put(lanes.is_reading, True),
        is_running=put(lanes.is_running, False),
        tokens=changed(
            lanes.tokens,
            is_active=put(lanes.tokens.is_active, False),
            positions=put(lanes.tokens.positions, -1),
        ),
    )
    if cache.is_medium is not None:
        cache = changed(cache, is_medium=put(cache.is_medium, False))
    cache = with_positions(cache, put(cache.next_position, 0), lanes.is_live)
    return constrained(for_rows(model, shape.rows), lanes, cache)


def copy(
    model: MegaTransformer,
    shape: BatchShape,
    batch: Batch,
    source: Int[Array, ""],
    row: Int[Array, ""],
    num_tokens: Int[Array, ""],
) -> Batch:
    """The first cached tokens of one row in another, or kept in the same."""
    model, lanes = for_rows(model, shape.rows), batch.lanes
    # Of a row that is copied to itself nothing moves.
    moved = jnp.where(source == row, 0, num_tokens)
    cache = copy_rows(batch.cache, source, row, moved, model.sharder)
    next_position = cache.next_position.at[row].set(num_tokens)
    cache = with_positions(cache, next_position, lanes.is_live)
    return constrained(model, lanes, cache)


def release(
    model: MegaTransformer, shape: BatchShape, batch: Batch, is_released: Bool[Array, "B"]
) -> Batch:
    """Rows that hold no text any more; their cached tokens stay until another is placed."""
    lanes, cache = _without(batch.lanes, is_released), batch.cache
    cache = with_positions(cache, cache.next_position, lanes.is_live)
    return constrained(for_rows(model, shape.rows), lanes, cache)


# ------------------------------------------------------------------------------
# New tokens.


def advance(
    model: MegaTransformer,
    shape: BatchShape,
    params: Any,
    lanes: Lanes,
    cache: KVCache,
    min_waiting: Int[Array, ""],
    max_ticks: Int[Array, ""],
) -> Lanes:
    """Iterates until `min_waiting` running rows wait for a turn; the cache is only read."""
    model = for_rows(model, shape.rows)
    params = gather_weights(model, params)
    rules = lanes.settings.rules
    limits = (min_waiting, max_ticks)
    with jax.named_scope("advance"):  # Tells this loop from those of `turn` in a compiled step.
        tokens, ticks = iterate_tokens(
            model, params, lanes.tokens, cache, rules, shape.choice, limits
        )
    lanes = changed(lanes, tokens=tokens, ticks=lanes.ticks + ticks)
    return constrain_lanes(model, lanes)


def turn(
    model: MegaTransformer,
    shape: BatchShape,
    params: Any,
    is_allowed: Bool[Array, "V"],
    batch: Batch,
) -> tuple[Batch, DeviceEvents]:
    """A token for each row that waits, and the start of the next; admits rows that are read.

    Coda and head read the cache without the rows' present tokens; then these are written; then the
    prelude of the next tokens reads them.
    """
    model = for_rows(model, shape.rows)
    params = gather_weights(model, params)
    lanes, cache, old = batch.lanes, batch.cache, batch.lanes.tokens
    is_done = lanes.is_running & ~old.is_active
    logits, rows = finish_tokens(model, params, old, cache, lanes.settings.rules)
    logits = constrain_rows(model.sharder, logits)
    lanes, events = _with_new_tokens(model, shape, lanes, is_allowed, logits, is_done)
    start = known_after(cache.next_position, logits)
    cache = changed(cache, next_position=start)
    cache = write_tokens(cache, rows, old.iteration, is_done, model.sharder)
    is_admitted = lanes.is_reading & (start >= lanes.settings.num_places - 1)
    lanes = changed(
        lanes,
        is_reading=lanes.is_reading & ~is_admitted,
        is_running=lanes.is_running | is_admitted,
    )
    cache = with_positions(cache, start + is_done, lanes.is_live)
    is_new = (is_done | is_admitted) & lanes.is_running
    lanes = _with_next_tokens(model, shape, params, lanes, cache, is_new, is_admitted)
    events = changed(
        events, is_running=lanes.is_running, iteration=lanes.tokens.iteration, ticks=lanes.ticks
    )
    return constrained(model, lanes, cache), constrain_rows_of(model, events.packed())


def step(
    model: MegaTransformer,
    shape: BatchShape,
    params: Any,
    is_allowed: Bool[Array, "V"],
    batch: Batch,
    limits: Int[Array, "4"],
) -> tuple[Batch, DeviceEvents]:
    """`advance`, then `turn`, and that again while the same rows run and `limits` allows it.

    One program to start in place of two, or of many: what the host does for each launch costs more
    than a small model's turn.

    Args:
      model: the model.
      shape: of the batch.
      params: of the model.
      is_allowed: tokens that may be drawn.
      batch: before.
      limits: packed `StepLimits`.
    """
    min_waiting, max_ticks, max_turns, num_running = limits

    def goes_on(carry: tuple[Batch, DeviceEvents, jax.Array]) -> jax.Array:
        batch, _, count = carry
        are_all_there = jnp.sum(batch.lanes.is_running) >= num_running
        return (count == 0) | ((count < max_turns) & are_all_there)

    def one(
        carry: tuple[Batch, DeviceEvents, jax.Array],
    ) -> tuple[Batch, DeviceEvents, jax.Array]:
        batch, events, count = carry
        lanes, cache = batch.lanes, batch.cache
        if model.config.is_recurrent:
            lanes = advance(model, shape, params, lanes, cache, min_waiting, max_ticks)
        batch, new = turn(model, shape, params, is_allowed, Batch(lanes, cache))

        def put(all_turns: jax.Array, own: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(all_turns, own, count, axis=1)

        return batch, jax.tree.map(put, events, new), count + 1

    events = DeviceEvents.none(shape.rows, shape.turns, shape.num_top)
    laid_out = for_rows(model, shape.rows)
    events = constrain_rows_of(laid_out, events)
    batch, events, _ = jax.lax.while_loop(goes_on, one, (batch, events, jnp.int32(0)))
    # What a loop leaves is laid out as the compiler likes, unless it is told.
    batch = constrained(laid_out, batch.lanes, batch.cache)
    return batch, constrain_rows_of(laid_out, events)


def _with_new_tokens(
    model: MegaTransformer,
    shape: BatchShape,
    lanes: Lanes,
    is_allowed: jax.Array,
    logits: jax.Array,
    is_done: jax.Array,
) -> tuple[Lanes, Events]:
    """Chooses tokens for the rows that are done, and ends those that it ends."""
    settings, history = lanes.settings, lanes.history
    chain = RowChain(settings.numbers, is_allowed, model.config.vocab_size)
    is_drawn = settings.numbers.is_drawn & is_done
    choice = choose(
        (chain,), (lanes.counts,), history, logits, settings.row_keys(), is_drawn=is_drawn
    )
    reason = jnp.where(is_done, RUNNING, EXHAUSTED)
    end = exhaust(EndState(reason, ()), choice.is_exhausted)
    is_added = is_done & end.is_running
    history = history.append(choice.tokens, is_added)
    ids = jnp.where(is_added, choice.tokens, model.config.vocab_size)
    ending = Ending(settings.numbers.end_ids, settings.max_new_tokens)
    end = ending.update(end, choice.tokens, history.num_generated)
    wanted = jnp.where(is_done, settings.num_top, 0)
    top_ids, top = top_log_probs(logits, wanted, shape.num_top)
    events = Events(
        is_done,
        choice.tokens,
        choice.log_probs,
        top_ids,
        top,
        lanes.tokens.iteration,
        jnp.where(is_done, end.reason, RUNNING),
        None,
        None,
        None,
    )
    lanes = changed(lanes, history=history, counts=chain.update(lanes.counts, history, ids))
    return _without(lanes, is_done & ~end.is_running), events


def _with_next_tokens(
    model: MegaTransformer,
    shape: BatchShape,
    params: Any,
    lanes: Lanes,
    cache: KVCache,
    is_new: jax.Array,
    is_admitted: jax.Array,
) -> Lanes:
    """Begins each new row's last token, which is not in the cache."""
    settings, old = lanes.settings, lanes.tokens
    # Prompts are read with their own key, once for all texts of a prompt.
    keys = jnp.where(is_admitted, settings.prompt_keys(), settings.row_keys())
    first = FirstStates(keys, old.state, settings.is_warm & ~is_admitted)
    ids = jnp.maximum(lanes.history.suffix(1)[:, 0], 0)
    positions = jnp.where(is_new, cache.next_position, -1)
    new = begin_tokens(model, params, ids, positions, cache, first, shape.choice)
    # Nobody reads what old tokens have left in the room for rows of the core.
    tokens = select_rows(is_new, new, changed(old, core=None))
    return changed(lanes, tokens=changed(tokens, core=old.core))


def _without(lanes: Lanes, is_over: jax.Array) -> Lanes:
    """Rows that hold no text any more."""
    tokens = changed(
        lanes.tokens,
        is_active=lanes.tokens.is_active & ~is_over,
        positions=jnp.where(is_over, -1, lanes.tokens.positions),
    )
    return changed(
        lanes,
        is_reading=lanes.is_reading & ~is_over,
        is_running=lanes.is_running & ~is_over,
        tokens=tokens,
    )


# ------------------------------------------------------------------------------
# Where arrays are.


def constrain_lanes(model: MegaTransformer, lanes: Lanes) -> Lanes:
    """Asks the compiler to cut rows as `batch`."""
    return constrain_rows_of(model, lanes)


def constrain_rows_of(model: MegaTransformer, tree: Any) -> Any:
    """As `constrain_rows`, for trees that hold single numbers too."""
    sharder = model.sharder
    if sharder.mesh is None:
        return tree
    return jax.tree.map(
        lambda array: constrain_rows(sharder, array) if array.ndim else sharder.constrain(array),
        tree,
    )


def constrained(model: MegaTransformer, lanes: Lanes, cache: KVCache) -> Batch:
    """A batch, whose arrays the compiler is asked to lay out as it keeps them."""
    numbers = constrain_rows_of(
        model,
        {"next_position": cache.next_position, "length": cache.length},
    )
    cache = changed(constrain_cache(model.sharder, cache), **numbers)
    return Batch(constrain_lanes(model, lanes), cache)


def _state_width(model: MegaTransformer) -> int:
    return model.config.state_width if model.config.is_recurrent else model.config.width


def changed(tree: Any, **changes: Any) -> Any:
    """A tree with other values in some places."""
    return tree.replace(**changes)
