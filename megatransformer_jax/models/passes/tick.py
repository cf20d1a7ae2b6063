"""One token per row on its way through the model, each row at its own iteration.

A pass takes all of its tokens from the embedding to the head before the next begins. Here rows are
taken apart: `begin_tokens` brings tokens to the core, `iterate_tokens` iterates all rows at once,
each at its own iteration, until enough of them have left the core, and `finish_tokens` brings those
to the head. What a token gets is what `cached_forward` of that token alone gives: it reads in each
iteration the slot that the iteration reads, sees the rows of its own sequence, and keeps its new
rows apart until they are written together.

A row that has left the core, or holds no token, is computed all the same and nobody sees what.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax.models.core import Pass
from megatransformer_jax.models.exit_criteria import (
    EXIT_CRITERIA,
    ExitCriterion,
    Observation,
    one_of,
)
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
    read_slot,
    with_cache,
)
from megatransformer_jax.nn.cache_sequences import NewRows
from megatransformer_jax.nn.context import CachedPass, LayerContext
from megatransformer_jax.nn.kv_cache import KVCache, slot_for
from megatransformer_jax.ops.cached_attention import CachedRows
from megatransformer_jax.ops.masks import AttentionMask

# ------------------------------------------------------------------------------
# What is on its way.


@struct.dataclass
class Tokens:
    """One token per row; every array begins with [B], so that rows can be exchanged.

    Attributes:
      ids: the tokens.
      positions: where they stand in their sequences; -1 for rows without one.
      state: the core's state; what the coda reads once the token has left.
      prepared: see `Pass.prepared`; None without a core, as all that follows.
      prelude: new rows [B, layers, K, 1, P].
      core: new rows of every slot, and behind them those of one that nobody reads.
      iteration: iterations done; 0 without a core.
      is_active: tokens that still iterate.
      memory: of the exit criteria.
    """

    ids: Int[Array, "B"]
    positions: Int[Array, "B"]
    state: Float[Array, "B 1 W"]
    prepared: Float[Array, "B 1 D"] | None
    prelude: Float[Array, "B E K 1 P"]
    core: Float[Array, "B E2 K 1 P2"] | None
    iteration: Int[Array, "B"]
    is_active: Bool[Array, "B"]
    memory: Any


@struct.dataclass
class RowRules:
    """How deep each row's tokens go, [B] each; see `DepthRule`.

    Attributes:
      depth: most iterations.
      min_depth: no token leaves earlier.
      threshold: of the criterion.
      code: the criterion's place in `Criteria.names`.
    """

    # Any because a row's own, as the host gives it, has no axis B.
    depth: Any
    min_depth: Any
    threshold: Any
    code: Any


@dataclasses.dataclass(frozen=True)
class Criteria:
    """The exit criteria that rows can choose from; hashable.

    Those that need logits cost coda and head in every iteration in which a row that has chosen one
    still iterates.

    Attributes:
      light: that need no logits, 'fixed' first.
      heavy: that need them.
    """

    light: tuple[str, ...]
    heavy: tuple[str, ...]

    @classmethod
    def of(cls, names: tuple[str, ...]) -> "Criteria":
        """These and 'fixed'."""
        known = [EXIT_CRITERIA[name] for name in dict.fromkeys(("fixed", *names))]
        light = tuple(each.name for each in known if not each.needs_logits)
        return cls(light, tuple(each.name for each in known if each.needs_logits))

    @property
    def names(self) -> tuple[str, ...]:
        """All of them; a row's code is an index into them."""
        return (*self.light, *self.heavy)

    def without_logits(self, code: Int[Array, "*rows"]) -> ExitCriterion:
        """The criterion of each row; 'fixed' where it has chosen one that needs logits."""
        return one_of(self.light, jnp.where(code < len(self.light), code, 0))

    def with_logits(self, code: Int[Array, "*rows"]) -> ExitCriterion:
        """The criterion of each row that has chosen one that needs logits; 'fixed' for others."""
        return one_of(("fixed", *self.heavy), jnp.maximum(code - len(self.light) + 1, 0))


def select_rows(is_new: Bool[Array, "B"], new: Any, old: Any) -> Any:
    """Trees of arrays that begin with [B]: new ones in some rows, old ones in the others."""

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        where = is_new.reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(where, new.astype(old.dtype), old)

    return jax.tree.map(select, new, old)


# ------------------------------------------------------------------------------
# From the embedding to the core.


@struct.dataclass
class FirstStates:
    """What the core's first state of each row's token is.

    Attributes:
      keys: for states that `recurrence.state_init` draws, see `token_states`.
      warm: [B, 1, D], states that go on instead.
      is_warm: rows in which they do.
    """

    keys: Key[Array, "B"]
    warm: Float[Array, "B 1 D"]
    is_warm: Bool[Array, "B"]


def begin_tokens(
    model: MegaTransformer,
    params: Any,
    ids: Int[Array, "B"],
    positions: Int[Array, "B"],
    cache: KVCache,
    first: FirstStates,
    criteria: Criteria,
) -> Tokens:
    """Embedding and prelude of one token per row, before the core's first iteration.

    Args:
      model: the model, laid out for the rows.
      params: gathered.
      ids: the tokens.
      positions: where they stand; -1 for rows without one.
      cache: with all tokens before them.
      first: what they begin with.
      criteria: what rows can choose from.

    Returns:
      The tokens, without room for the core's rows: that of tokens before serves, or
      `empty_core_rows`.
    """
    config, columns = model.config, positions[:, None]
    places = jnp.maximum(columns, 0)
    outer = _context(model, params, ids, columns, config.width)
    context = _reading(outer, read_prelude(cache), columns, _lengths(model, cache, columns))
    x, rows = apply_prelude(model, params, ids[:, None], places, context, cache)
    zeros = jnp.zeros(ids.shape, jnp.int32)
    tokens = Tokens(
        ids, positions, x, None, _rows_first(rows), None, zeros, jnp.zeros(ids.shape, bool), ()
    )
    if cache.core is None:
        return tokens
    inner = layer_context(config, places, outer.mask, config.core_width)
    core = open_pass(model, params, x, inner)
    state = token_states(config, first.keys, places, core.injected).astype(core.injected.dtype)
    state = select_rows(first.is_warm, first.warm, state)
    begun: Any = tokens
    begun = begun.replace(
        state=state,
        prepared=core.prepared,
        is_active=positions >= 0,
        memory=(
            criteria.without_logits(zeros).init(state, config.vocab_size),
            criteria.with_logits(zeros).init(state, config.vocab_size) if criteria.heavy else (),
        ),
    )
    return cast(Tokens, begun)


# ------------------------------------------------------------------------------
# The core.


def iterate_tokens(
    model: MegaTransformer,
    params: Any,
    tokens: Tokens,
    cache: KVCache,
    rules: RowRules,
    criteria: Criteria,
    limits: tuple[Int[Array, ""], Int[Array, ""]],
) -> tuple[Tokens, Int[Array, ""]]:
    """Iterates until so many tokens have left the core, or so many times, or none is active.

    Args:
      model: the model, with a core.
      params: gathered.
      tokens: on their way.
      cache: what came before; only read, so a constant of the loop.
      rules: of the rows.
      criteria: what rows choose from.
      limits: how many tokens that are not active any more, and most iterations.

    Returns:
      The tokens, and how many iterations were made.
    """
    config, columns = model.config, tokens.positions[:, None]
    outer = _context(model, params, tokens.ids, columns, config.width)
    inner = layer_context(config, jnp.maximum(columns, 0), outer.mask, config.core_width)
    inner = dataclasses.replace(inner, value_embeddings=outer.value_embeddings)
    assert tokens.prepared is not None
    # Whoever reads `prepared` reads that of the tokens; that of zeros is never computed.
    core: Any = open_pass(
        model,
        params,
        jnp.zeros_like(tokens.state, shape=(tokens.ids.shape[0], 1, config.width)),
        inner,
    )
    core = core.replace(prepared=tokens.prepared, cache=cache)
    has_token, (min_waiting, max_ticks) = tokens.positions >= 0, limits
    lengths = _lengths(model, cache, columns)

    def logits_of(state: jax.Array) -> jax.Array:
        context = _reading(outer, read_entries(cache.coda, cache), columns, lengths)
        return apply_head(model, params, apply_coda(model, params, state, context, cache)[0])

    def gate_of(state: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply({"params": params}, state, method="run_gate"))

    def goes_on(carry: tuple[Tokens, jax.Array]) -> jax.Array:
        tokens, ticks = carry
        waiting = jnp.sum(has_token & ~tokens.is_active)
        return jnp.any(tokens.is_active) & (waiting < min_waiting) & (ticks < max_ticks)

    def tick(carry: tuple[Tokens, jax.Array]) -> tuple[Tokens, jax.Array]:
        tokens, ticks = carry
        new, rows = _iterate(core, tokens, columns, lengths)
        state = jnp.where(tokens.is_active[:, None, None], new, tokens.state)
        light = criteria.without_logits(rules.code)
        gate = gate_of(state) if light.needs_gate else None
        value, kept = light.measure(tokens.memory[0], Observation(state, None, gate))
        is_settled, memory = light.is_settled(value, rules.threshold), (kept, ())
        if criteria.heavy:
            of_logits, kept = _measure_logits(criteria, rules, tokens, state, logits_of)
            is_settled, memory = is_settled | of_logits, (memory[0], kept)
        iteration = tokens.iteration + tokens.is_active
        leaves = is_settled[:, 0] & (iteration >= rules.min_depth) | (iteration >= rules.depth)
        changed: Any = tokens
        changed = changed.replace(
            state=state,
            core=rows,
            iteration=iteration,
            is_active=tokens.is_active & ~leaves,
            memory=memory,
        )
        return changed, ticks + 1

    iterated: tuple[Tokens, jax.Array] = jax.lax.while_loop(goes_on, tick, (tokens, jnp.int32(0)))
    return iterated


def _iterate(
    core: Pass, tokens: Tokens, columns: jax.Array, lengths: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Each row's next state, and the core's new rows with those of this iteration."""
    cache = core.cache
    assert cache is not None and tokens.core is not None
    layers = core_layers(cache)
    slot = slot_for(tokens.iteration, cache.num_slots, cache.sharing)
    context = _reading(core.context, read_slot(cache, slot, layers), columns, lengths)
    state, new = iterate_and_sow(core, tokens.state, context, tokens.iteration[:, None])
    # Tokens that have left write into the slot that nobody reads.
    entry = jnp.where(tokens.is_active, slot, cache.num_slots) * layers

    put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 0))
    return state, put(tokens.core, jnp.moveaxis(new, 1, 0).astype(tokens.core.dtype), entry)


def _measure_logits(
    criteria: Criteria, rules: RowRules, tokens: Tokens, state: jax.Array, logits_of: Any
) -> tuple[jax.Array, Any]:
    """Which tokens have settled by criteria that need logits, and these criteria's memory."""
    heavy = criteria.with_logits(rules.code)

    def measure(memory: Any) -> tuple[jax.Array, Any]:
        value, memory = heavy.measure(memory, Observation(state, logits_of(state)))
        return heavy.is_settled(value, rules.threshold), memory

    def skip(memory: Any) -> tuple[jax.Array, Any]:
        return jnp.zeros(state.shape[:2], bool), memory

    is_read = jnp.any(tokens.is_active & (rules.code >= len(criteria.light)))
    measured: tuple[jax.Array, Any] = jax.lax.cond(is_read, measure, skip, tokens.memory[1])
    return measured


# ------------------------------------------------------------------------------
# From the core to the head.


def finish_tokens(
    model: MegaTransformer, params: Any, tokens: Tokens, cache: KVCache, rules: RowRules
) -> tuple[Float[Array, "B V"], NewRows]:
    """Coda and head of every row's state: logits, and all of the tokens' rows for the cache."""
    columns = tokens.positions[:, None]
    outer = _context(model, params, tokens.ids, columns, model.config.width)
    lengths = _lengths(model, cache, columns)
    context = _reading(outer, read_entries(cache.coda, cache), columns, lengths)
    hidden, coda = apply_coda(model, params, tokens.state, context, cache)
    logits = apply_head(model, params, hidden)[:, 0]
    return logits, NewRows((tokens.prelude, _rows_first(coda)), tokens.core, rules.depth)


# ------------------------------------------------------------------------------
# Contexts and rows.


def _context(
    model: MegaTransformer, params: Any, ids: jax.Array, columns: jax.Array, width: int
) -> LayerContext:
    mask = AttentionMask(is_causal=True, window=model.config.attention.window)
    context = layer_context(model.config, jnp.maximum(columns, 0), mask, width)
    return with_values(model, params, context, ids[:, None])


def _lengths(model: MegaTransformer, cache: KVCache, columns: jax.Array) -> Int[Array, "B"] | None:
    """Rows that each token reads, where attention can tell sequences apart."""
    if model.sharder.mesh is not None or not cache.block_rows:
        return None
    return jnp.where(columns[:, 0] >= 0, cache.next_position, 0)


def _reading(
    context: LayerContext, rows: CachedRows, columns: jax.Array, lengths: jax.Array | None
) -> LayerContext:
    own: Any = rows
    rows = own.replace(lengths=lengths)
    return with_cache(context, CachedPass(rows, columns, columns))


def _rows_first(rows: Float[Array, "E B K 1 P"]) -> Float[Array, "B E K 1 P"]:
    return jnp.moveaxis(rows, 1, 0)


def empty_core_rows(cache: KVCache) -> Float[Array, "B E K 1 P"] | None:
    """Zeros for every slot of the core and one more; None without a core."""
    if cache.core is None:
        return None
    entries, batch_size, heads, _, width = cache.core.shape
    shape = (batch_size, entries + core_layers(cache), heads, 1, width)
    return jnp.zeros(shape, cache.core.dtype)
