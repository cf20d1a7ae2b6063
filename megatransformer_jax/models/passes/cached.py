"""One forward pass over new tokens with a key/value cache: prefill, a chunk of it, or one token."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax import streams
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.core import Pass, initial_state
from megatransformer_jax.models.exit_criteria import DepthRule
from megatransformer_jax.models.megatransformer import (
    MegaTransformer,
    gather_weights,
    layer_context,
    open_pass,
    with_values,
)
from megatransformer_jax.models.passes.depth_loop import (
    DepthResult,
    LoopState,
    begin_loop,
    end_loop,
    known_after,
    run_loop,
    stack_rows,
    with_cache,
)
from megatransformer_jax.nn.context import NEW_ROWS, CachedPass, LayerContext
from megatransformer_jax.nn.kv_cache import KVCache, NewPairs, constrain_cache, write_rows
from megatransformer_jax.nn.layer_sharing import stack_owners
from megatransformer_jax.ops.cached_attention import CachedRows
from megatransformer_jax.ops.masks import AttentionMask

# ------------------------------------------------------------------------------
# The pass.


@struct.dataclass
class Inserted:
    """Images and sound among the new tokens, as their encoders leave them.

    Attributes:
      values: what the core gets in place of the text's prelude.
      is_medium: where.
    """

    values: Float[Array, "B T D"]
    is_medium: Bool[Array, "B T"]


@struct.dataclass
class NewTokens:
    """What one pass adds to the cache.

    Attributes:
      tokens: ids, padded on either side; those at places of media do not matter.
      is_token: False for padding.
      inserted: media among the tokens. The text's prelude does not see them, as without a cache.
      state: the core's first state, [B, T, state width]. None: `recurrence.state_init`.
      state_keys: a key per sequence, for first states that are drawn at random. A token's draw
        depends on its sequence's key and on its position, not on how the prompt is chunked.
      is_first: static; promises that the cache is empty, so that fused attention kernels can serve.
    """

    tokens: Int[Array, "B T"]
    is_token: Bool[Array, "B T"]
    inserted: Inserted | None = None
    state: Float[Array, "B T D"] | None = None
    state_keys: Key[Array, "B"] | None = None
    is_first: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class CachedOutput:
    """What a pass returns.

    Attributes:
      logits: of every new token, or of each sequence's last one ([B, 1, V]).
      state: the core's raw state, [B, T, state width]; the prelude's output without a core.
      num_steps: iterations that each token took; 0 for padding.
      cache: with the new tokens.
      memory: what the rule's criterion keeps of the last iteration; None without a core.
    """

    logits: Float[Array, "B T2 V"]
    state: Float[Array, "B T D"]
    num_steps: Int[Array, "B T"]
    cache: KVCache
    memory: Any = None


def cached_forward(
    model: MegaTransformer,
    params: Any,
    new: NewTokens,
    cache: KVCache,
    rule: DepthRule,
    *,
    last_logits_only: bool = False,
) -> CachedOutput:
    """Passes new tokens through the model.

    Args:
      model: the model; on a mesh, its sharder must suit B sequences of T tokens.
      params: parameters.
      new: the tokens, and what stands among them.
      cache: what came before, with room for T rows. With media among the tokens, one made for them.
      rule: how deep tokens go. Ignored without a core.
      last_logits_only: static; computes logits of each sequence's last token only.

    Raises:
      ValueError: if the state is drawn at random and there are no keys, the rule's criterion needs
        an exit gate that the model has not, or there are media and the cache has no room for them.
    """
    is_token = new.is_token
    is_medium = None if new.inserted is None else new.inserted.is_medium
    if is_medium is not None and cache.is_medium is None:
        raise ValueError("the cache was made for text alone; make it with_media=True.")
    params = gather_weights(model, params)
    places = cache.next_position[:, None] + jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1
    read = read_tokens(model, params, new, cache, rule, jnp.maximum(places, 0))
    hidden = read.hidden
    if last_logits_only:
        hidden = last_token(hidden, is_token)[:, None]
    length = known_after(cache.length, hidden)
    cache = cache.replace(length=length)  # type: ignore[attr-defined]
    positions = jnp.where(is_token, places, -1)
    cache = write_rows(cache, read.rows, positions, read.num_steps, is_medium)
    cache = constrain_cache(model.sharder, cache)
    logits = apply_head(model, params, hidden)
    return CachedOutput(logits, read.state, read.num_steps, cache, read.memory)


@struct.dataclass
class TokensRead:
    """A pass before anything is written.

    Attributes:
      hidden: the coda's output of every token.
      state: the core's last state; the prelude's output without a core.
      num_steps: iterations of each token; 0 for padding.
      rows: for the cache.
      memory: see `CachedOutput`.
    """

    hidden: Float[Array, "B T D"]
    state: Float[Array, "B T D2"]
    num_steps: Int[Array, "B T"]
    rows: NewPairs
    memory: Any


def read_tokens(
    model: MegaTransformer,
    params: Any,
    new: NewTokens,
    cache: KVCache,
    rule: DepthRule,
    places: Int[Array, "B T"],
) -> TokensRead:
    """Everything of `cached_forward` but the head; the cache is only read, and may be a view.

    Args:
      model: as of `cached_forward`.
      params: gathered.
      new: the tokens.
      cache: what came before.
      rule: how deep tokens go.
      places: of the tokens in their sequences; what padding has does not matter.
    """
    around = _contexts(model, params, new, cache, places)
    x, prelude_rows = _enter(model, params, new, cache, places, around)
    if cache.core is None:
        hidden, coda_rows = apply_coda(model, params, x, around.outer, cache)
        num_steps = jnp.zeros(new.tokens.shape, jnp.int32)
        return TokensRead(hidden, x, num_steps, (prelude_rows, None, coda_rows), None)
    core = _open_core(model, params, x, cache, rule, around)
    loop = begin_loop(core, _first_state(model.config, new, places, core))
    return _read_last(model, params, core, prelude_rows, loop)


@struct.dataclass
class PartRead:
    """New tokens in the middle of their iterations; nothing of them has been written.

    Attributes:
      prelude: the prelude's rows for the cache.
      prepared: see `Pass.prepared`.
      loop: where the core's loop is.
    """

    prelude: Float[Array, "E B K T P"]
    prepared: Float[Array, "B T D"]
    loop: LoopState


def read_part(
    model: MegaTransformer,
    params: Any,
    new: NewTokens,
    cache: KVCache,
    rule: DepthRule,
    places: Int[Array, "B T"],
    end: Int[Array, ""],
    before: PartRead | None = None,
) -> PartRead:
    """`read_tokens` up to an iteration of the core, for `read_rest` to go on. There must be a core.

    In between the cache may get other sequences' rows, but none of these.

    Args:
      model, params, new, cache, rule, places: as of `read_tokens`, the same in all parts.
      end: iterations that are to be done, those of the parts before included.
      before: the part before. None: this is the first.
    """
    around = _contexts(model, params, new, cache, places)
    if before is None:
        x, prelude = _enter(model, params, new, cache, places, around)
        core = _open_core(model, params, x, cache, rule, around)
        loop = begin_loop(core, _first_state(model.config, new, places, core))
    else:
        core = _reopen_core(model, params, before, cache, rule, around)
        prelude, loop = before.prelude, before.loop
    loop = run_loop(core, loop, *_judges(model, params, core), end)
    return PartRead(prelude, core.prepared, loop)


def read_rest(
    model: MegaTransformer,
    params: Any,
    new: NewTokens,
    cache: KVCache,
    rule: DepthRule,
    places: Int[Array, "B T"],
    before: PartRead,
) -> TokensRead:
    """The last part: what `read_tokens` would have given; arguments as of `read_part`."""
    around = _contexts(model, params, new, cache, places)
    core = _reopen_core(model, params, before, cache, rule, around)
    return _read_last(model, params, core, before.prelude, before.loop)


@dataclasses.dataclass(frozen=True)
class _Contexts:
    """What the layers before, inside and behind the core are given; see `Pass.context`."""

    prelude: LayerContext
    inner: LayerContext
    outer: LayerContext


def _contexts(
    model: MegaTransformer, params: Any, new: NewTokens, cache: KVCache, places: jax.Array
) -> _Contexts:
    config, is_token = model.config, new.is_token
    is_medium = None if new.inserted is None else new.inserted.is_medium
    positions = jnp.where(is_token, places, -1)
    mask = AttentionMask(is_causal=True, window=config.attention.window)
    outer = layer_context(config, places, mask, config.width)
    is_text = None if is_medium is None else ~is_medium
    outer = with_values(model, params, outer, new.tokens, is_text)

    def reading(context: LayerContext, rows: CachedRows, positions: jax.Array) -> LayerContext:
        cached = CachedPass(rows, positions, positions, None, None, new.is_first)
        return with_cache(context, cached)

    text = positions if is_medium is None else jnp.where(is_medium, -1, positions)
    prelude = reading(outer, read_prelude(cache), text)
    outer = reading(outer, read_entries(cache.coda, cache), positions)
    inner = outer
    if cache.core is not None:
        inner = layer_context(config, places, mask, config.core_width)
        inner = dataclasses.replace(inner, value_embeddings=outer.value_embeddings)
        inner = reading(inner, read_entries(cache.core, cache), positions)
    return _Contexts(prelude, inner, outer)


def _enter(
    model: MegaTransformer,
    params: Any,
    new: NewTokens,
    cache: KVCache,
    places: jax.Array,
    around: _Contexts,
) -> tuple[jax.Array, jax.Array]:
    """What the core is given: the prelude's output, or a medium's values. And the cache's rows."""
    x, rows = apply_prelude(model, params, new.tokens, places, around.prelude, cache)
    if new.inserted is not None:
        x = jnp.where(new.inserted.is_medium[..., None], new.inserted.values.astype(x.dtype), x)
        x = model.sharder.constrain(x, "batch", "length", None)
    return x, rows


def _open_core(
    model: MegaTransformer,
    params: Any,
    x: jax.Array,
    cache: KVCache,
    rule: DepthRule,
    around: _Contexts,
) -> Pass:
    core: Any = open_pass(model, params, x, around.inner)
    return cast(Pass, core.replace(outer=around.outer, cache=cache, rule=rule))


def _reopen_core(
    model: MegaTransformer,
    params: Any,
    before: PartRead,
    cache: KVCache,
    rule: DepthRule,
    around: _Contexts,
) -> Pass:
    # Whoever reads `prepared` reads what is kept; that of zeros is never computed.
    shape = (*before.prepared.shape[:2], model.config.width)
    nothing = jnp.zeros(shape, before.prepared.dtype)
    core: Any = _open_core(model, params, nothing, cache, rule, around)
    return cast(Pass, core.replace(prepared=before.prepared))


def _first_state(config: ModelConfig, new: NewTokens, places: jax.Array, core: Pass) -> jax.Array:
    state = new.state
    if state is None:
        state = token_states(config, new.state_keys, places, core.injected)
    return state.astype(core.injected.dtype)


def _read_last(
    model: MegaTransformer, params: Any, core: Pass, prelude_rows: jax.Array, loop: LoopState
) -> TokensRead:
    """The iterations that are left, and the coda."""
    assert core.outer is not None and core.cache is not None
    loop = run_loop(core, loop, *_judges(model, params, core))
    result: DepthResult = end_loop(core, loop)
    hidden, coda_rows = apply_coda(model, params, result.read, core.outer, core.cache)
    rows = (prelude_rows, result.rows, coda_rows)
    return TokensRead(hidden, result.state, result.num_steps, rows, result.memory)


def _judges(model: MegaTransformer, params: Any, core: Pass) -> tuple[Any, Any]:
    """The model's coda with its head, and its gate, for criteria that ask them."""
    outer, cache = core.outer, core.cache
    assert outer is not None and cache is not None

    def logits_of(state: jax.Array) -> jax.Array:
        return apply_head(model, params, apply_coda(model, params, state, outer, cache)[0])

    def gate_of(state: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply({"params": params}, state, method="run_gate"))

    return logits_of, gate_of


def last_token(array: Float[Array, "B T X"], is_token: Bool[Array, "B T"]) -> Float[Array, "B X"]:
    """Each sequence's entry at its last token; at 0 if it has none."""
    rows = jnp.arange(is_token.shape[1])
    last = jnp.max(jnp.where(is_token, rows, 0), axis=1)
    return jnp.take_along_axis(array, last[:, None, None], axis=1)[:, 0]


def token_states(
    config: ModelConfig,
    keys: Key[Array, "B"] | None,
    places: Int[Array, "B T"],
    injected: Float[Array, "B T D"],
) -> Float[Array, "B T W"]:
    """First states, one draw per token, from its sequence's key and its position.

    Raises:
      ValueError: if `recurrence.state_init` draws and there are no keys.
    """
    if keys is None:
        return initial_state(config, None, injected)

    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, streams.FIRST_STATE)

    def draw(key: jax.Array, place: jax.Array, injected: jax.Array) -> jax.Array:
        state = initial_state(config, jax.random.fold_in(key, place), injected[None, None])
        return state[0, 0]

    over_tokens = jax.vmap(draw, in_axes=(None, 0, 0))
    return jax.vmap(over_tokens)(keys, places, injected)


# ------------------------------------------------------------------------------
# The parts of a model outside its core, applied to new tokens with a cache.


def apply_prelude(
    model: MegaTransformer,
    params: Any,
    tokens: jax.Array,
    places: jax.Array,
    context: LayerContext,
    cache: KVCache,
) -> tuple[jax.Array, jax.Array]:
    """Embedding and prelude of tokens [B, T]: [B, T, D], and the rows for the cache."""
    x, sown = _apply(model, params, tokens, places, context, method="run_prelude")
    return x, _rows_of(model.config, sown, "prelude", cache.prelude, x)


def apply_coda(
    model: MegaTransformer, params: Any, state: jax.Array, context: LayerContext, cache: KVCache
) -> tuple[jax.Array, jax.Array]:
    """The coda's output [B, T, D] from the core's state, and the rows for the cache."""
    (_, hidden), sown = _apply(model, params, state, context, method="run_coda")
    return hidden, _rows_of(model.config, sown, "coda", cache.coda, hidden)


def apply_head(model: MegaTransformer, params: Any, hidden: jax.Array) -> jax.Array:
    """Logits [B, T, V], float32, from the coda's output."""
    return cast(jax.Array, model.apply({"params": params}, hidden, method="run_head"))


def read_entries(
    entries: Float[Array, "E B K S P"], cache: KVCache, first: jax.Array | int = 0
) -> CachedRows:
    """The cache as a stack's layers read it; `first` is the entry of the first layer."""
    return CachedRows(
        entries,
        first,
        cache.positions,
        cache.length,
        cache.block_rows,
        cache.lanes,
        sequence=cache.sequence,
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
    config: ModelConfig, sown: dict[str, Any], stack: str, entries: jax.Array, x: jax.Array
) -> jax.Array:
    """A stack's new rows; of no layers if it has none."""
    if stack in sown:
        return stack_rows(sown[stack], stack_owners(config, stack))
    return jnp.zeros((0, x.shape[0], entries.shape[2], x.shape[1], entries.shape[-1]), x.dtype)
