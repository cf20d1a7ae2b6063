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
import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax import streams
from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState
from megatransformer_jax.generation.endings import EndState, exhaust
from megatransformer_jax.generation.history import History, put_in_rows
from megatransformer_jax.generation.placement import constrain_rows, fetch, replicate
from megatransformer_jax.generation.processors.processor import (
    apply_chain,
    argmax,
    is_exhausted,
    safe_softmax,
    update_chain,
)
from megatransformer_jax.generation.token_choice import token_log_probs
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.models.passes.cached import CachedOutput, NewTokens, cached_forward
from megatransformer_jax.nn.cache_rows import keep_rows, sequence_ends
from megatransformer_jax.nn.kv_cache import KVCache, drop_rows

# ------------------------------------------------------------------------------
# Rounds.

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


# ------------------------------------------------------------------------------
# Drafts tokens with few iterations of the core.
#
# A draft needs no cache of its own. In a full cache every iteration has its own slot, so a shallow
# pass reads what the first iterations of the full passes have left there, and of the drafted tokens
# what the shallow passes have just written behind it. Those rows are dropped before the
# verification.


@struct.dataclass
class Drafts:
    """Drafted tokens of one round.

    Attributes:
      tokens: int32 [B, K].
      is_drafted: bool [B, K], in each row a first part.
      scores: float32 [K, B, V], what they were drawn from, after the logits processors; None if the
        likeliest were taken.
    """

    tokens: Any
    is_drafted: Any
    scores: Any


@struct.dataclass
class _Drafting:
    cache: KVCache
    history: History
    chain_states: tuple[Any, ...]
    end: EndState


def draft(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    draft_depth: jax.Array,
    draft_length: int,
) -> tuple[Drafts, KVCache]:
    """Continues each running row by up to `draft_length` tokens.

    A row stops where its draft ends the text, and one token before its limit of new tokens, since
    a verification adds one token to the drafts.

    Returns:
      The drafts; and the cache, which remembers nothing of them.
    """
    depth = jnp.minimum(draft_depth, settings.rule.depth)
    rule = settings.rule.replace(depth=depth)  # type: ignore[attr-defined]

    def add_one(carry: _Drafting, _: None) -> tuple[_Drafting, tuple[jax.Array, ...]]:
        has_room = carry.history.num_generated + 1 < settings.ending.max_new_tokens
        goes_on = carry.end.is_running & has_room
        new = NewTokens(carry.history.suffix(1), goes_on[:, None], state_keys=settings.row_keys)
        output = cached_forward(model, params, new, carry.cache, rule)
        logits = constrain_rows(settings.sharder, output.logits[:, 0])
        scores = apply_chain(settings.chain, carry.chain_states, carry.history, logits)
        if settings.is_drawn:
            tokens = draw(scores, stream_keys(settings.row_keys, carry.history, streams.DRAFT))
        else:
            tokens = argmax(scores)
        end = exhaust(carry.end, is_exhausted(scores))
        is_drafted = goes_on & end.is_running
        history = carry.history.append(tokens, is_drafted)
        carry = _Drafting(
            output.cache,
            history,
            update_chain(settings.chain, carry.chain_states, history, tokens),
            settings.ending.update(end, tokens, history.num_generated),
        )
        drafted = (tokens, is_drafted)
        return carry, (*drafted, scores) if settings.is_drawn else drafted

    carry = _Drafting(state.cache, state.history, state.chain_states, state.end)
    carry, (tokens, is_drafted, *scores) = jax.lax.scan(add_one, carry, length=draft_length)
    cache = drop_rows(carry.cache, jnp.zeros(tokens.T.shape, bool))
    return Drafts(tokens.T, is_drafted.T, scores[0] if scores else None), cache


# ------------------------------------------------------------------------------
# Speculative sampling: keeps a drafted token or replaces it, without changing the distribution.
#
# Leviathan et al. 2022 (arXiv 2211.17192): a token drawn from q is kept with probability min(1, p /
# q); otherwise one is drawn from max(p - q, 0), normalised. The result is distributed as p whatever
# q is.


class Verdict(typing.NamedTuple):
    """What comes of drafted tokens.

    Attributes:
      tokens: int32 [B], the drafted ones or their replacements.
      is_accepted: bool [B], which are the drafted ones.
    """

    tokens: jax.Array
    is_accepted: jax.Array


def judge(
    scores: Float[Array, "B V"],
    draft_scores: Float[Array, "B V"],
    drafts: Int[Array, "B"],
    is_drafted: Bool[Array, "B"],
    accept_keys: Key[Array, "B"],
    replace_keys: Key[Array, "B"],
) -> Verdict:
    """Keeps or replaces one drafted token per row; a row without one gets a draw from p.

    Args:
      scores: log p up to a constant per row, -inf for banned tokens. A row that has all banned gets
        token 0, which means nothing.
      draft_scores: log q likewise.
      drafts: drawn from q.
      is_drafted: False where there is no draft.
      accept_keys: keys of the decision.
      replace_keys: keys of the replacement.
    """
    target = safe_softmax(scores)
    # Without a draft nothing can be kept, and what q leaves of p is p.
    draft = jnp.where(is_drafted[:, None], safe_softmax(draft_scores), 0.0)
    chance = jnp.take_along_axis(target, drafts[:, None], axis=1)[:, 0]
    draft_chance = jnp.take_along_axis(draft, drafts[:, None], axis=1)[:, 0]
    uniform = jax.vmap(jax.random.uniform)(accept_keys)
    is_accepted = is_drafted & (uniform * draft_chance < chance)

    residual = jnp.maximum(target - draft, 0.0)
    # Only rounding can reject where p and q are the same; then nothing is left of p.
    is_left = jnp.any(residual > 0, axis=-1, keepdims=True)
    residual = jnp.where(is_left, residual, target)
    replacements = draw(jnp.log(residual), replace_keys)
    return Verdict(jnp.where(is_accepted, drafts, replacements), is_accepted)


def draw(scores: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int[Array, "B"]:
    """A token per row from softmax(scores): `jax.random.categorical` with a faster argmax."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
    return argmax(scores + noise)


def stream_keys(row_keys: Key[Array, "B"], history: History, stream: int) -> Key[Array, "B"]:
    """The keys of one stream for the tokens that come next.

    They depend on a row's key and on its length. So rows do not influence each other, and it does
    not matter how often the place was drafted before in vain: those drafts were dropped for what
    came before them, and their numbers decided nothing.
    """

    def derive(key: jax.Array, length: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, length), stream)

    return jax.vmap(derive)(row_keys, history.lengths)


# ------------------------------------------------------------------------------
# Verifies drafts: one pass at full depth over all of them, then token by token what comes of it.
#
# The pass gives the model's scores behind the last token and behind each draft. They go through the
# logits processors in order, as in `decode_loop`: each sees the history and the state behind the
# drafts that were accepted before. A row leaves at its first rejected draft, with the replacement;
# at the end of its drafts, with one more token; or where its text ends. So nothing has to be rolled
# back but the cache.


@struct.dataclass
class Verified:
    """What a round adds.

    Attributes:
      state: with the new tokens.
      num_added: new tokens of each row.
      num_accepted: how many of them were drafted.
    """

    state: DecodeState
    num_added: Int[Array, "B"]
    num_accepted: Int[Array, "B"]


@struct.dataclass
class _Verifying:
    column: jax.Array
    is_live: jax.Array  # Rows whose drafts have all been accepted so far.
    verified: Verified


def verify(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    drafts: Drafts,
    ends: Int[Array, "B"],
) -> Verified:
    """Adds the accepted drafts and one token more to each running row.

    Args:
      model: the model.
      params: its parameters.
      settings: of the whole generation.
      state: before the drafts.
      drafts: of all rows.
      ends: `sequence_ends` of the cache.
    """
    was_running = state.end.is_running
    new = NewTokens(
        jnp.concatenate((state.history.suffix(1), drafts.tokens), axis=1),
        jnp.concatenate((was_running[:, None], drafts.is_drafted), axis=1),
        state_keys=settings.row_keys,
    )
    output = cached_forward(model, params, new, state.cache, settings.rule)
    logits = constrain_rows(settings.sharder, output.logits)
    # Behind the last draft there is none to be judged.
    drafts = Drafts(
        jnp.pad(drafts.tokens, ((0, 0), (0, 1))),
        jnp.pad(drafts.is_drafted, ((0, 0), (0, 1))),
        drafts.scores,
    )
    num_columns = logits.shape[1]
    nothing = jnp.zeros_like(ends)
    state = state.replace(cache=output.cache)  # type: ignore[attr-defined]
    carry = jax.lax.while_loop(
        lambda carry: (carry.column < num_columns) & jnp.any(carry.is_live),
        lambda carry: _add_token(settings, logits, output.num_steps, drafts, carry),
        _Verifying(jnp.int32(0), was_running, Verified(state, nothing, nothing)),
    )
    verified: Any = carry.verified
    num_added = verified.num_added
    state = verified.state.replace(
        cache=keep_rows(verified.state.cache, ends, num_added, num_columns, settings.sharder),
        core_state=_last_state(output, state.core_state, num_added),
    )
    replaced: Verified = verified.replace(state=state)
    return replaced


def _add_token(
    settings: DecodeSettings,
    all_logits: Float[Array, "B T V"],
    all_steps: Int[Array, "B T"],
    drafts: Drafts,
    carry: _Verifying,
) -> _Verifying:
    """Judges one column: its draft, or a token instead of it, is added to the live rows."""
    state = carry.verified.state
    logits, num_steps, tokens, is_drafted = (
        jax.lax.dynamic_index_in_dim(array, carry.column, axis=1, keepdims=False)
        for array in (all_logits, all_steps, drafts.tokens, drafts.is_drafted)
    )
    scores = apply_chain(settings.chain, state.chain_states, state.history, logits)
    if settings.is_drawn:
        # The index stays at the last scores where there are none and no draft either.
        draft_scores = jax.lax.dynamic_index_in_dim(drafts.scores, carry.column, keepdims=False)
        keys = [
            stream_keys(settings.row_keys, state.history, stream)
            for stream in (streams.ACCEPT, streams.REPLACE)
        ]
        tokens, is_accepted = judge(scores, draft_scores, tokens, is_drafted, *keys)
    else:
        likeliest = argmax(scores)
        tokens, is_accepted = Verdict(likeliest, is_drafted & (likeliest == tokens))

    end = exhaust(state.end, is_exhausted(scores) & carry.is_live)
    is_added = carry.is_live & end.is_running
    history = state.history.append(tokens, is_added)
    chain_states = update_chain(settings.chain, state.chain_states, history, tokens)
    new_end = settings.ending.update(end, tokens, history.num_generated)
    end = _where_rows(is_added, new_end, end)
    changes = {
        "history": history,
        "chain_states": _where_rows(is_added, chain_states, state.chain_states),
        "end": end,
        "steps": put_in_rows(
            state.steps, jnp.where(is_added, state.history.lengths, history.capacity), num_steps
        ),
        "scores": state.scores + jnp.where(is_added, token_log_probs(logits, tokens), 0.0),
    }
    changed: Any = state
    verified = Verified(
        changed.replace(**constrain_rows(settings.sharder, changes)),
        carry.verified.num_added + is_added,
        carry.verified.num_accepted + (is_added & is_accepted),
    )
    return _Verifying(carry.column + 1, is_added & is_accepted & end.is_running, verified)


def _where_rows(is_new: Bool[Array, "B"], new: Any, old: Any) -> Any:
    """Of trees whose every leaf begins with [B], the rows of one or of the other."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(is_new.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)


def _last_state(
    output: CachedOutput, before: Float[Array, "B 1 D"], num_added: Int[Array, "B"]
) -> Float[Array, "B 1 D"]:
    """The core's state at the newest token that stays in the cache."""
    last = jnp.maximum(num_added - 1, 0)[:, None, None]
    state = jnp.take_along_axis(output.state, last, axis=1)
    return jnp.where((num_added > 0)[:, None, None], state, before)
