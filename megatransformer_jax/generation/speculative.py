"""Self-speculative decoding: few iterations draft, all of them verify, the result is the same.

A recurrent-depth model is its own draft model (arXiv 2502.05171, section 6.4). A round drafts
`draft_length` tokens, one by one at `draft_depth` iterations; one pass at full depth over all of
them says which first part of them stays; and that pass gives one more token. Nothing is lost by a
bad draft but time: greedy decoding has the tokens of `decode` (but for rounding, see below), and
drawn tokens have its distribution after the logits processors (arXiv 2211.17192).

Rows accept different numbers of tokens; each has only its own, see `speculative_cache`. So the
cache needs `rows_needed` rows for new tokens, draft_length more than `decode` does.

Reusing the drafts' iterations in the verification would be exact too, as a token's first iterations
read nothing but the first iterations of others. But the last draft would need a shallow pass of its
own, so as many iterations follow each other as without it, and a round is hardly faster.

Rounding: a pass over several tokens adds up in another order than passes over one. Where two tokens
have equal scores but for the last bits, `decode` and `speculate` may take different ones.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState
from megatransformer_jax.generation.placement import fetch, replicate
from megatransformer_jax.generation.speculative_draft import draft
from megatransformer_jax.generation.speculative_verification import verify
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.nn.cache_rows import sequence_ends

# More rounds than there are tokens.
_ALL_ROUNDS = 2**31 - 1


@struct.dataclass
class SpeculationStats:
    """How well drafting went.

    Attributes:
      num_drafted: tokens drafted, per row.
      num_accepted: of these, how many became part of the text.
      num_rounds: drafts and verifications of the batch.
    """

    num_drafted: Int[Array, "B"]
    num_accepted: Int[Array, "B"]
    num_rounds: Int[Array, ""]


# The state, the statistics, and where each sequence's rows end.
_Carry = tuple[DecodeState, SpeculationStats, jax.Array]


def rows_needed(max_new_tokens: int, draft_length: int) -> int:
    """Rows of the cache behind the prompt's columns that any course of the drafts can take.

    The last round may begin when another row of the batch has all its tokens, max_new_tokens - 1
    rows, and passes draft_length + 1 rows.
    """
    return max_new_tokens + draft_length


def speculate(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    *,
    draft_depth: int,
    draft_length: int,
    max_rounds: int | None = None,
) -> tuple[DecodeState, SpeculationStats]:
    """Adds tokens until all rows have ended, or for `max_rounds` rounds.

    Compiles once per draft_length and per structure of the settings; all numbers are data.

    Args:
      model: with a core.
      params: parameters.
      settings: of the whole generation; depth 'fixed', no warm start.
      state: from `decode_loop.start`, from `decode` or from here; donated.
      draft_depth: iterations of a draft.
      draft_length: tokens drafted before a verification.
      max_rounds: of this call. None: until all rows have ended.

    Returns:
      The state; and how the drafts of this call went.

    Raises:
      UserError: if the settings cannot be decoded speculatively, or the new tokens do not fit into
        the cache.
    """
    _check_settings(model, settings, draft_depth, draft_length)
    _check_room(settings, state, draft_length)
    numbers = (draft_depth, _ALL_ROUNDS if max_rounds is None else max_rounds)
    return _run_rounds(
        model,
        params,
        settings,
        state,
        *(replicate(settings.sharder, jnp.int32(number)) for number in numbers),
        draft_length=draft_length,
    )


@functools.partial(
    jax.jit, static_argnums=0, static_argnames="draft_length", donate_argnames="state"
)
def _run_rounds(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    draft_depth: jax.Array,
    max_rounds: jax.Array,
    *,
    draft_length: int,
) -> tuple[DecodeState, SpeculationStats]:
    params = gather_weights(model, params)

    def goes_on(carry: _Carry) -> jax.Array:
        state, stats, _ = carry
        return (stats.num_rounds < max_rounds) & jnp.any(state.end.is_running)

    def run_round(carry: _Carry) -> _Carry:
        state, stats, ends = carry
        drafts, cache = draft(model, params, settings, state, draft_depth, draft_length)
        state = state.replace(cache=cache)  # type: ignore[attr-defined]
        verified = verify(model, params, settings, state, drafts, ends)
        stats = SpeculationStats(
            stats.num_drafted + jnp.sum(drafts.is_drafted, axis=1, dtype=jnp.int32),
            stats.num_accepted + verified.num_accepted,
            stats.num_rounds + 1,
        )
        return verified.state, stats, ends + verified.num_added

    ends = sequence_ends(state.cache)
    stats = SpeculationStats(jnp.zeros_like(ends), jnp.zeros_like(ends), jnp.int32(0))
    state, stats, _ = jax.lax.while_loop(goes_on, run_round, (state, stats, ends))
    return state, stats


def _check_settings(
    model: MegaTransformer, settings: DecodeSettings, draft_depth: int, draft_length: int
) -> None:
    if not model.config.is_recurrent:
        raise UserError(
            "speculative decoding drafts with few iterations of a core, and this model has none; "
            "choose another strategy."
        )
    for name, number in (("draft_depth", draft_depth), ("draft_length", draft_length)):
        if number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1.")
    criterion = settings.rule.criterion.name
    if criterion != "fixed":
        raise UserError(
            f"speculative decoding needs the exit criterion 'fixed', not {criterion!r}: tokens "
            "that are passed at once would leave at other iterations than one by one."
        )
    if settings.warm_start:
        raise UserError(
            "speculative decoding cannot start a token from the state of the one before "
            "(warm_start), as both are passed at once; leave it off."
        )


def _check_room(settings: DecodeSettings, state: DecodeState, draft_length: int) -> None:
    rows, tokens, depth = fetch(settings.sharder, _demand(settings, state))
    rows = rows + draft_length + 1
    cache, history = state.cache, state.history
    if depth > cache.num_slots:
        raise UserError(
            f"speculative decoding needs a cache slot for each of the {depth} iterations, and "
            f"there are {cache.num_slots}: where iterations share slots, tokens that are passed at "
            "once read other iterations than one by one. Leave slots out."
        )
    if rows > cache.capacity:
        raise UserError(
            f"the cache has {cache.capacity} rows, and {rows} may be needed with "
            f"draft_length={draft_length}; make it larger (see rows_needed), or lower "
            "max_new_tokens or draft_length."
        )
    if tokens > history.capacity:
        raise UserError(
            f"the history has room for {history.capacity} tokens per row, and {tokens} are needed; "
            "make it larger or lower max_new_tokens."
        )


@jax.jit
def _demand(settings: DecodeSettings, state: DecodeState) -> tuple[jax.Array, ...]:
    """Rows that tokens will take in the cache, tokens in a history, and the largest depth."""
    history = state.history
    num_left = jnp.where(
        state.end.is_running, settings.ending.max_new_tokens - history.num_generated, 0
    )
    rows = jnp.max(sequence_ends(state.cache) + num_left)
    return rows, jnp.max(history.lengths + num_left), jnp.max(settings.rule.depth)
