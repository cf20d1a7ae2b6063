"""Refines many positions at once: the diffusion-style sampler of arXiv 2510.14961.

In every round each unsettled position (the wavefront) iterates the core a few times on its present
token, then the tokens behind all of them are drawn again, and one more position joins. The first
positions whose states have settled become final: their tokens are text, their keys and values
enter the cache. A row's draw depends on its key and the token's place, as in `decode_loop`, so a
settled state means a settled token.

How this differs from the paper:

- A position is final only if the token that it iterated on is still the one drawn before it, and it
  iterates at most `depth` times on the same text. Counting restarts when a token of the
  wavefront at or before it changes; its state goes on. So with a threshold of about 0 the result is
  that of token-by-token decoding, as far as the core forgets where it came from.
- Rows of a batch advance on their own, and shapes are static: a round computes the smallest of a
  few widths that holds the longest wavefront.
- Noise on the states and momentum of the embeddings are left out.

    state = start(settings, prefilled, history)
    result = sample_parallel(model, params, settings, state, iterations_per_round=jnp.int32(4),
                             settle_threshold=jnp.float32(0.03), max_wavefront=8)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState
from megatransformer_jax.generation.endings import exhaust
from megatransformer_jax.generation.history import put_in_rows
from megatransformer_jax.generation.placement import constrain_rows
from megatransformer_jax.generation.processors.cuts import MinP, Temperature, TopK, TopP, Typical
from megatransformer_jax.generation.processors.penalties import MinNewTokens
from megatransformer_jax.generation.processors.processor import (
    AllowedTokens,
    Chain,
    init_chain,
    per_row,
)
from megatransformer_jax.generation.token_choice import Choice, choose
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.models.passes.wavefront import Columns, Refined, refine
from megatransformer_jax.nn.cache_rows import write_staggered_rows
from megatransformer_jax.nn.kv_cache import KVCache, constrain_cache, slot_for

# ------------------------------------------------------------------------------
# The unsettled positions of each row: which are settled, and how they move up.
#
# Column j of a row is the j-th position that is not in the cache yet. Column 0 holds the last final
# token; the token in column j + 1 was drawn behind column j, and is drawn again every round.


@struct.dataclass
class Wavefront:
    """What is known of the unsettled positions.

    Attributes:
      tokens: int32 [B, W].
      state: of the core, [B, W, state width].
      iterations: int32 [B, W], since the column's token or one before it has changed. Never more
        than in the column before.
      count: int32 [B], columns in use; 0 once a row has ended.
      new_column: int32 [B], the column that begins in the next round; W for none.
    """

    tokens: Any
    state: Any
    iterations: Any
    count: Any
    new_column: Any

    @property
    def is_used(self) -> Bool[Array, "B W"]:
        """Columns that hold a position."""
        return jnp.arange(self.tokens.shape[1]) < self.count[:, None]

    def positions(self, cache: KVCache) -> Int[Array, "B W"]:
        """Places in each row's sequence; -1 for columns not in use."""
        columns = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)
        return jnp.where(self.is_used, cache.next_position[:, None] + columns, -1)


def begin(
    tokens: Int[Array, "B"],
    state: Float[Array, "B 1 D"],
    is_running: Bool[Array, "B"],
    num_columns: int,
) -> Wavefront:
    """One position per running row: the last token.

    Args:
      tokens: of each row, the last.
      state: the first state with a warm start.
      is_running: rows that have not ended.
      num_columns: W.
    """
    shape = (tokens.shape[0], num_columns)
    return Wavefront(
        tokens=jnp.broadcast_to(tokens[:, None], shape),
        state=jnp.broadcast_to(state, (*shape, state.shape[-1])),
        iterations=jnp.zeros(shape, jnp.int32),
        count=is_running.astype(jnp.int32),
        new_column=jnp.zeros(tokens.shape, jnp.int32),
    )


def count_settled(
    wavefront: Wavefront,
    drawn: Int[Array, "B W"],
    is_settled: Bool[Array, "B W"],
) -> Int[Array, "B"]:
    """First columns of each row that are settled and had the right token to settle with.

    Args:
      wavefront: after a round.
      drawn: tokens behind its columns.
      is_settled: by state or by number of iterations.
    """
    is_right = _with_first(wavefront, drawn)[:, :-1] == wavefront.tokens
    is_final = is_settled & is_right & wavefront.is_used
    return jnp.sum(jnp.cumprod(is_final.astype(jnp.int32), axis=1), axis=1)


def move_up(
    wavefront: Wavefront,
    drawn: Int[Array, "B W"],
    num_final: Int[Array, "B"],
    num_wanted: Int[Array, "B"],
) -> Wavefront:
    """The wavefront of the next round: without its final columns, and with one more position.

    Args:
      wavefront: after a round.
      drawn: tokens behind its columns.
      num_final: first columns of each row that have become final.
      num_wanted: tokens that each row may still get, so no more columns; 0 if it has ended.
    """
    num_columns = drawn.shape[1]
    following = _with_first(wavefront, drawn)
    is_changed = jnp.cumsum(following[:, :-1] != wavefront.tokens, axis=1) > 0
    iterations = jnp.where(is_changed, 0, wavefront.iterations)
    num_left = wavefront.count - num_final
    source = num_final[:, None] + jnp.arange(num_columns)
    # The new position continues, with a warm start, from the state of the one before.
    of_state = jnp.minimum(source, jnp.maximum(wavefront.count - 1, 0)[:, None])
    is_old = jnp.arange(num_columns) < num_left[:, None]
    moved = jnp.take_along_axis(iterations, jnp.minimum(source, num_columns - 1), axis=1)
    count = jnp.minimum(jnp.minimum(num_left + 1, num_columns), num_wanted)
    return Wavefront(
        tokens=jnp.take_along_axis(following, jnp.minimum(source, num_columns), axis=1),
        state=jnp.take_along_axis(wavefront.state, of_state[..., None], axis=1),
        iterations=jnp.where(is_old, moved, 0),
        count=count,
        new_column=jnp.where(num_left < count, num_left, num_columns),
    )


def _with_first(wavefront: Wavefront, drawn: jax.Array) -> jax.Array:
    """The newest token of each column and of the one behind the last, [B, W + 1]."""
    return jnp.concatenate([wavefront.tokens[:, :1], drawn], axis=1)


# ------------------------------------------------------------------------------
# The sampler.

# Processors that look at no token but the next: those before it are not final.
SUPPORTED_PROCESSORS = (AllowedTokens, MinNewTokens, Temperature, TopK, TopP, MinP, Typical)


@struct.dataclass
class ParallelResult:
    """Texts, and what they cost.

    Attributes:
      state: as `decode` leaves it. `steps` counts a token's iterations on its final text.
      num_rounds: int32 [].
      num_iterations: int32 [B], of all positions of a row in all rounds.
    """

    state: DecodeState
    num_rounds: Any
    num_iterations: Any


@struct.dataclass
class _Carry:
    result: ParallelResult
    wavefront: Wavefront
    next_row: jax.Array


def sample_parallel(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    *,
    iterations_per_round: jax.Array,
    settle_threshold: jax.Array,
    max_wavefront: int,
) -> ParallelResult:
    """Continues each running row until it ends.

    Args:
      model: with a core.
      params: its parameters.
      settings: of the whole generation; with `warm_start`, a new position's first state is the
        present one of the position before.
      state: of `start`; donated. Its cache needs one slot only: all positions read the slot of the
        last iteration. It must have `rows_needed` free rows.
      iterations_per_round: int32 [] or [B], at least 1.
      settle_threshold: float32 [] or [B]; a position has settled once a round changes its state by
        less than this fraction.
      max_wavefront: static; most positions that are refined at once.

    Raises:
      UserError: if the model has no core, a number is out of range, the cache has no room, or the
        settings need final tokens (exit criteria, processors that look at the text).
    """
    _check(model, settings, state, iterations_per_round, max_wavefront)
    return _sample(
        model,
        params,
        settings,
        state,
        iterations_per_round,
        settle_threshold,
        max_wavefront=max_wavefront,
    )


def rows_needed(max_new_tokens: int, max_wavefront: int) -> int:
    """Rows of the cache for the new tokens; whole wavefronts are copied there."""
    return max_new_tokens + max_wavefront


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("max_wavefront",), donate_argnames=("state",)
)
def _sample(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    iterations_per_round: jax.Array,
    settle_threshold: jax.Array,
    *,
    max_wavefront: int,
) -> ParallelResult:
    params = gather_weights(model, params)
    batch_size = state.history.tokens.shape[0]
    carry = _Carry(
        ParallelResult(state, jnp.int32(0), jnp.zeros((batch_size,), jnp.int32)),
        begin(state.history.suffix(1)[:, 0], state.core_state, state.end.is_running, max_wavefront),
        jnp.broadcast_to(state.cache.length, (batch_size,)),
    )
    step = functools.partial(
        _round, model, params, settings, iterations_per_round, settle_threshold
    )
    carry = jax.lax.while_loop(
        lambda carry: jnp.any(carry.result.state.end.is_running), step, carry
    )
    state = carry.result.state
    state = state.replace(  # type: ignore[attr-defined]
        core_state=carry.wavefront.state[:, :1],
        chain_states=init_chain(settings.chain, state.history),
    )
    result: ParallelResult = carry.result.replace(state=state)  # type: ignore[attr-defined]
    return result


def _round(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    iterations_per_round: jax.Array,
    settle_threshold: jax.Array,
    carry: _Carry,
) -> _Carry:
    wavefront, state = carry.wavefront, carry.result.state
    left = per_row(settings.rule.depth) - wavefront.iterations
    iterations = jnp.minimum(left, per_row(iterations_per_round))
    iterations = jnp.where(wavefront.is_used, iterations, 0)
    refined, choice = _narrowest(
        wavefront,
        widths(wavefront.tokens.shape[1], model.platform),
        functools.partial(_refine, model, params, settings, state, wavefront, iterations),
    )
    wavefront = wavefront.replace(  # type: ignore[attr-defined]
        state=refined.state, iterations=wavefront.iterations + iterations
    )
    is_settled = refined.change < per_row(settle_threshold)
    is_settled |= wavefront.iterations >= per_row(settings.rule.depth)
    num_final = count_settled(wavefront, choice.tokens, is_settled)
    before = state.history.lengths
    state = _append(settings, state, choice, num_final, wavefront.iterations)
    # A row that ends needs none of the columns behind its last token.
    num_final = state.history.lengths - before
    cache = write_staggered_rows(
        state.cache,
        refined.rows,
        wavefront.iterations,
        jnp.arange(iterations.shape[1]) < num_final[:, None],
        # Adds nothing, but is known only when the cache has been read, see `cached_forward`.
        carry.next_row + jnp.minimum(num_final, 0),
        settings.sharder,
    )
    num_wanted = settings.ending.max_new_tokens - state.history.num_generated
    cache = constrain_cache(settings.sharder, cache)
    result = ParallelResult(
        state.replace(cache=cache),  # type: ignore[attr-defined]
        carry.result.num_rounds + 1,
        carry.result.num_iterations + jnp.sum(iterations, axis=1),
    )
    wavefront = move_up(
        wavefront, choice.tokens, num_final, jnp.where(state.end.is_running, num_wanted, 0)
    )
    return _Carry(result, wavefront, carry.next_row + num_final)


def _refine(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    wavefront: Wavefront,
    iterations: jax.Array,
    width: int,
) -> tuple[Refined, Choice]:
    """One round of the first `width` columns, which hold all that are in use."""
    columns = slice(0, width)
    round_columns = Columns(
        wavefront.tokens[:, columns],
        wavefront.positions(state.cache)[:, columns],
        iterations[:, columns],
        wavefront.iterations[:, columns],
        wavefront.state[:, columns],
        None if settings.warm_start else wavefront.new_column,
    )
    slot = _last_slot(settings, state.cache)
    refined, logits = refine(model, params, round_columns, state.cache, slot, settings.row_keys)
    return refined, _choose(settings, state, constrain_rows(settings.sharder, logits))


def _last_slot(settings: DecodeSettings, cache: KVCache) -> Any:
    return slot_for(jnp.max(settings.rule.depth) - 1, cache.num_slots, cache.sharing)


def _choose(settings: DecodeSettings, state: DecodeState, logits: jax.Array) -> Choice:
    """The tokens behind all columns, [B, W] each, with the draws that `decode` would make there."""

    def choose_one(logits: jax.Array, column: jax.Array) -> Choice:
        history = state.history.replace(  # type: ignore[attr-defined]
            lengths=state.history.lengths + column
        )
        return choose(
            settings.chain,
            state.chain_states,
            history,
            logits,
            settings.row_keys,
            is_drawn=settings.is_drawn,
        )

    return jax.vmap(choose_one, in_axes=(1, 0), out_axes=1)(logits, jnp.arange(logits.shape[1]))


def _narrowest(
    wavefront: Wavefront,
    widths: Sequence[int],
    refine_columns: Callable[[int], tuple[Refined, Choice]],
) -> tuple[Refined, Choice]:
    """Computes the smallest width that will do; results have all columns."""
    num_columns = wavefront.tokens.shape[1]

    def branch(width: int) -> Callable[[], tuple[Refined, Choice]]:
        def run() -> tuple[Refined, Choice]:
            refined, choice = refine_columns(width)
            missing = num_columns - width
            refined = refined.replace(  # type: ignore[attr-defined]
                state=_pad(refined.state, missing, 1),
                change=_pad(refined.change, missing, 1),
                rows=_pad(refined.rows, missing, 3),
            )
            return refined, _pad(choice, missing, 1)

        return run

    index = jnp.searchsorted(jnp.asarray(widths), jnp.max(wavefront.count))
    result: tuple[Refined, Choice] = jax.lax.switch(index, [branch(width) for width in widths])
    return result


def widths(num_columns: int, platform: str) -> list[int]:
    """2, 4, 8, ... and the number of columns; each compiles the model once more.

    On TPU all columns alone. A round of few takes the time of reading the weights there, and
    libtpu 0.0.42 compiles such a choice in a loop for minutes, even of the smallest model.
    """
    if platform == "tpu":
        return [num_columns]
    powers = [1 << exponent for exponent in range(1, num_columns.bit_length())]
    return [power for power in powers if power < num_columns] + [num_columns]


def _pad(arrays: Any, count: int, axis: int) -> Any:
    """Zeros behind the end of an axis."""

    def pad(array: jax.Array) -> jax.Array:
        return jnp.pad(array, [(0, count if axis == i else 0) for i in range(array.ndim)])

    return jax.tree.map(pad, arrays)


def _append(
    settings: DecodeSettings,
    state: DecodeState,
    choice: Choice,
    num_final: jax.Array,
    iterations: jax.Array,
) -> DecodeState:
    """Appends the tokens behind the final columns, one by one, until a row ends."""

    def append_one(column: jax.Array, state: DecodeState) -> DecodeState:
        chosen, is_final = jax.tree.map(lambda array: array[:, column], choice), column < num_final
        end = exhaust(state.end, chosen.is_exhausted & is_final)
        is_added = end.is_running & is_final
        history = state.history.append(chosen.tokens, is_added)
        at = jnp.where(is_added, state.history.lengths, history.capacity)
        updated = settings.ending.update(end, chosen.tokens, history.num_generated)
        end = jax.tree.map(lambda new, old: jnp.where(is_added, new, old), updated, end)
        added: DecodeState = state.replace(  # type: ignore[attr-defined]
            history=history,
            end=end,
            steps=put_in_rows(state.steps, at, iterations[:, column]),
            scores=state.scores + jnp.where(is_added, chosen.log_probs, 0.0),
        )
        return added

    appended: DecodeState = jax.lax.fori_loop(0, jnp.max(num_final), append_one, state)
    return appended


def _check(
    model: MegaTransformer,
    settings: DecodeSettings,
    state: DecodeState,
    iterations_per_round: jax.Array,
    max_wavefront: int,
) -> None:
    if not model.config.is_recurrent:
        raise UserError("parallel sampling iterates a core, and this model has none.")
    if settings.rule.lets_tokens_differ and settings.rule.criterion.name != "fixed":
        raise UserError(
            f"parallel sampling does not use the exit criterion {settings.rule.criterion.name!r}: "
            "settle_threshold decides; give 'fixed'."
        )
    if state.cache.exited_reads != "latest":
        raise UserError(
            f"parallel sampling needs a cache with exited_reads='latest', not "
            f"{state.cache.exited_reads!r}: positions of all depths read one slot."
        )
    _check_chain(settings.chain)
    numbers = (iterations_per_round, settings.ending.max_new_tokens, state.cache.length)
    iterations, max_new_tokens, length = (np.asarray(n) for n in jax.device_get(numbers))
    if iterations.min() < 1 or max_wavefront < 1:
        raise UserError(
            f"iterations_per_round is {iterations.min()} and max_wavefront {max_wavefront}; both "
            "must be at least 1."
        )
    new_rows = rows_needed(int(max_new_tokens.max()), max_wavefront)
    if length + new_rows > state.cache.capacity:
        raise UserError(
            f"the cache has {state.cache.capacity} rows, and {length + new_rows} are needed: "
            f"{length} are in use, and new tokens may take {new_rows}. Raise its capacity."
        )


def _check_chain(chain: Chain) -> None:
    for processor in chain:
        if not isinstance(processor, SUPPORTED_PROCESSORS):
            names = ", ".join(kind.__name__ for kind in SUPPORTED_PROCESSORS)
            raise UserError(
                f"parallel sampling cannot use {type(processor).__name__}, which looks at tokens "
                f"that are not final yet; possible are {names}."
            )
