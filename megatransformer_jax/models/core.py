"""The recurrent core: its iteration, a pass through it, the loop in two phases, the draw of depth.

Reverse-mode differentiation needs a loop of known length, and memory for each of its turns.
Truncated backpropagation (arXiv 2502.05171, section 3) needs both only for the last
`backprop_depth` iterations. So the loop has two phases:

1. a loop with a traced count, on arguments behind `stop_gradient`: it stores nothing;
2. a scan of static length `backprop_depth`, differentiated and, if asked, rematerialised.

So one compilation serves every depth. Rows (or tokens) may have counts of their own. All end
together: a row with a smaller count joins later and shows its initial state until then. Aligned at
the end, every row's last iterations lie in the second phase; aligned at the start, a short row
would end before it and would train nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.config.model import ModelConfig, RecurrenceConfig
from megatransformer_jax.models.exit_criteria import DepthRule
from megatransformer_jax.models.gate_readout import (
    GateReadout,
    begin_reading,
    finish_reading,
    read_iteration,
)
from megatransformer_jax.nn.adapters import build_adapter
from megatransformer_jax.nn.block import KEPT_STATE, Stack, remat_policy
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.nn.embedding import embedding_scale
from megatransformer_jax.nn.kv_cache import KVCache
from megatransformer_jax.nn.layer_sharing import stack_owners
from megatransformer_jax.nn.loop_parameters import HyperConnections, Loop, begin_streams
from megatransformer_jax.nn.norms import Norm
from megatransformer_jax.nn.parameters import truncated_normal, vector, weight_init
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# One iteration.


class RecurrentCore(nn.Module):
    """Adapter, layers, and the optional norm at the end of an iteration."""

    config: ModelConfig
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    def setup(self) -> None:
        """Builds the parts at the core's width."""
        config = self.config
        init = weight_init(config, config.core_width)
        self.adapter = build_adapter(config, init, self.policy)
        recurrence = config.recurrence
        if recurrence.loop_embedding:
            shape = (recurrence.own_iterations, config.core_width)
            self.loop_embedding = vector(self, "loop_embedding", nn.initializers.zeros, shape)
        if recurrence.hyper_connections:
            sizes = (recurrence.hyper_connections, recurrence.own_iterations)
            self.connections = HyperConnections(*sizes)
        owners = stack_owners(config, "core")
        parts = (init, self.policy, self.sharder, self.platform)
        self.layers = Stack(config, owners, *parts, stack="core")
        if config.recurrence.iteration_norm:
            self.iteration_norm = Norm(config.norm)

    def prepare(self, injected: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the adapter needs of the injected embedding, the same for all iterations."""
        return self.adapter.prepare(injected)

    def __call__(
        self, state: Float[Array, "B T W"], prepared: Float[Array, "B T D"], context: LayerContext
    ) -> Float[Array, "B T W"]:
        """The next state.

        Raises:
          ValueError: if iterations differ in parameters and the context does not say which this is.
        """
        recurrence, loop = self.config.recurrence, context.loop
        if recurrence.has_loop_parameters and loop is None:
            raise ValueError("the core's iterations differ; give the number (see `at_iteration`)")
        read = state
        if loop is not None and recurrence.hyper_connections:
            read = self.connections.read(state, loop)
        x = self.adapter(read, prepared)
        if loop is not None and recurrence.loop_embedding:
            x = x + loop.of(self.loop_embedding).astype(x.dtype)
        new = self.layers(x, context)
        if self.config.recurrence.iteration_norm:
            new = self.iteration_norm(new)
        if loop is not None and recurrence.hyper_connections:
            new = self.connections.write(state, read, new, loop)
        return self.sharder.constrain(new, "batch", "length", None)

    def prepare_and_call(
        self, state: Float[Array, "B T W"], injected: Float[Array, "B T D"], context: LayerContext
    ) -> jax.Array:
        """Touches every parameter once; used to initialise them."""
        return self(state, self.prepare(injected), context)


def at_iteration(
    config: ModelConfig, context: LayerContext, iteration: Int[Array, "*rows"] | int
) -> LayerContext:
    """The context of one iteration.

    Args:
      config: the model.
      context: for the core's layers.
      iteration: its number, from 0: [] for all, [B] per row, [B, T] per token. Read only where
        iterations differ in parameters.
    """
    recurrence = config.recurrence
    if not recurrence.has_loop_parameters:
        return context
    number = jnp.asarray(iteration)
    if number.ndim == 1:
        number = number[:, None]
    loop = Loop(number, recurrence.own_iterations, recurrence.loop_lora_rank, recurrence.loop_scale)
    return dataclasses.replace(context, loop=loop)


# ------------------------------------------------------------------------------
# A pass through the core.


@struct.dataclass
class Pass:
    """What the iterations of the core over one batch are given, the same for all of them.

    `MegaTransformer.enter_core` makes it. Every way through the core takes it: the loop of a whole
    pass, the loop with a cache, a round of the parallel sampler, and what looks at single
    iterations from outside.

    Attributes:
      core: the module of one iteration.
      params: its weights, in the compute type and whole on every fsdp device.
      injected: the prelude's output as it enters the core.
      prepared: its part of every iteration, see `RecurrentCore.prepare`.
      context: masks and positions for the core's layers, and how they read a cache.
      outer: the same for the layers around the core, where somebody runs the coda.
      cache: what came before; None in a whole pass. Only read.
      rule: how deep tokens go; None where the caller counts iterations.
      dropout_key: None for no dropout. Each iteration has its own masks.
    """

    core: RecurrentCore = struct.field(pytree_node=False)
    params: Any
    injected: Float[Array, "B T D"]
    prepared: Float[Array, "B T D"]
    context: LayerContext
    outer: LayerContext | None = None
    cache: KVCache | None = None
    rule: DepthRule | None = None
    dropout_key: Key[Array, ""] | None = None

    def iterate(
        self,
        state: Float[Array, "B T D"],
        iteration: Int[Array, "*rows"] | int,
        step: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "B T D"]:
        """The next state; rematerialised as `model.remat` says.

        Args:
          state: the core's state.
          iteration: which one this is, from 0, of all rows or of each row or token.
          step: turn of the loop, which dropout depends on. None: `iteration`, which is one number.
        """
        remat = self.core.config.remat
        advance = _step if remat == "none" else jax.checkpoint(_step, policy=remat_policy(remat))
        return advance(self, state, iteration, iteration if step is None else step)

    def first_state(self, key: Key[Array, ""] | None) -> Float[Array, "B T D"]:
        """The state before the first iteration, see `initial_state`."""
        return self.place(initial_state(self.core.config, key, self.injected))

    def place(self, state: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """A state in the type and on the devices that the iterations want."""
        state = state.astype(self.injected.dtype)
        return self.core.sharder.constrain(state, "batch", "length", None)

    def stopped(self) -> "Pass":
        """The same pass, through which no gradient reaches weights or injection."""
        params, prepared, values = jax.lax.stop_gradient(
            (self.params, self.prepared, self.context.value_embeddings)
        )
        context = dataclasses.replace(self.context, value_embeddings=values)
        stopped: Pass = self.replace(  # type: ignore[attr-defined]
            params=params, prepared=prepared, context=context
        )
        return stopped


def _step(
    core: Pass, state: jax.Array, iteration: jax.Array | int, step: jax.Array | int
) -> jax.Array:
    if core.core.config.remat == "offload":
        state = checkpoint_name(state, KEPT_STATE)
    rngs = {}
    if core.dropout_key is not None:
        rngs = {"dropout": jax.random.fold_in(core.dropout_key, step)}
    variables = {"params": core.params}
    context = at_iteration(core.core.config, core.context, iteration)
    new_state = core.core.apply(variables, state, core.prepared, context, rngs=rngs)
    return cast(jax.Array, new_state)


# ------------------------------------------------------------------------------
# The loop: first without gradients, then with.


def recur(
    core: Pass,
    state: Float[Array, "B T D"],
    num_steps: Int[Array, "*draws"],
    *,
    backprop_depth: int,
    unroll: int = 1,
    trains_state: bool = False,
    kept_every: int = 1,
    see_previous: Callable[[Float[Array, "B T D"]], object] | None = None,
) -> Float[Array, "B T D"]:
    """Iterates the core `num_steps` times.

    Args:
      core: what its iterations are given.
      state: the state to begin with.
      num_steps: traced count: one for all ([]), per row ([B]) or per token ([B, T]). May be 0.
      backprop_depth: last iterations that gradients flow through. 0: the whole loop has a traced
        count and cannot be differentiated in reverse (inference).
      unroll: iterations of the second phase that are laid out per turn of its scan.
      trains_state: gradients flow into `state` too, where no more than `backprop_depth` iterations
        follow it.
      kept_every: of the states before iterations with gradients every n-th is kept; the others are
        computed again. Divides `backprop_depth`.
      see_previous: called once, while the loop with gradients is traced, with the state before the
        last iteration, which is the last one of every row. None: that state is not kept.

    Returns:
      The state after the last iteration; rows whose count is 0 keep theirs.
    """
    total = jnp.max(num_steps)
    begin = first_iteration(num_steps, total)

    def advance(core: Pass, state: jax.Array, step: jax.Array) -> jax.Array:
        new_state = core.iterate(state, _own_number(step, begin), step)
        return jnp.where(step >= begin, new_state, state)

    num_stopped, stopped, first = jnp.maximum(total - backprop_depth, 0), core, state
    if backprop_depth:
        stopped, state = core.stopped(), jax.lax.stop_gradient(state)
    state = jax.lax.fori_loop(0, num_stopped, lambda i, s: advance(stopped, s, i), state)
    if not backprop_depth:
        return state
    if trains_state:  # Rows that have not joined yet still have it.
        state = jnp.where(begin >= num_stopped, first, state)
    # Draws below backprop_depth make the first of these iterations negative: before every begin.
    steps = total - backprop_depth + jnp.arange(backprop_depth)

    return _recur_with_gradients(
        core,
        state,
        steps,
        advance,
        unroll=unroll,
        kept_every=kept_every,
        see_previous=see_previous,
    )


def _recur_with_gradients(
    core: Pass,
    state: jax.Array,
    steps: jax.Array,
    advance: Callable[[Pass, jax.Array, jax.Array], jax.Array],
    *,
    unroll: int,
    kept_every: int,
    see_previous: Callable[[jax.Array], object] | None,
) -> jax.Array:
    """The loop's second phase, iterations `steps`; the rest as of `recur`."""
    # The state and, if somebody wants to see it, the one before.
    num_carried = 1 if see_previous is None else 2

    def scan(core: Pass, state: jax.Array, steps: jax.Array) -> tuple[jax.Array, ...]:
        def turn(carried: tuple[jax.Array, ...], step: jax.Array) -> tuple[Any, None]:
            state = carried[0]
            return (advance(core, state, step), state)[:num_carried], None

        carried, _ = jax.lax.scan(turn, (state,) * num_carried, steps, unroll=unroll)
        return carried

    if kept_every == 1:
        carried = scan(core, state, steps)
    else:
        group = jax.checkpoint(scan, policy=jax.checkpoint_policies.nothing_saveable)
        groups = steps.reshape(-1, kept_every)
        first = (state,) * num_carried
        carried, _ = jax.lax.scan(lambda c, steps: (group(core, c[0], steps), None), first, groups)
    if see_previous is not None:
        see_previous(carried[1])
    return carried[0]


def recur_reading(
    core: Pass,
    state: Float[Array, "B T D"],
    num_steps: Int[Array, "*draws"],
    readout: GateReadout,
    gate_of: Callable[[Float[Array, "B T D"]], Float[Array, "B T"]],
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Iterates as `recur` with backprop_depth=0, and reads the states as the gate says.

    Args:
      core: what its iterations are given.
      state: the state to begin with.
      num_steps: as of `recur`, at least 1.
      readout: which way.
      gate_of: logits of the exit gate from a state.

    Returns:
      The last state, and what coda and head read.
    """
    total = jnp.max(num_steps)
    begin = first_iteration(num_steps, total)

    def advance(step: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        state, reading = carry
        joined = jnp.broadcast_to(step >= begin, (*state.shape[:2], 1))
        new_state = core.iterate(state, _own_number(step, begin), step)
        state = jnp.where(joined, new_state, state)
        return state, read_iteration(readout, reading, state, gate_of(state), joined[..., 0])

    first = (state, begin_reading(readout, state))
    state, reading = jax.lax.fori_loop(0, total, advance, first)
    return state, finish_reading(readout, reading, state)


def recur_observed(
    core: Pass,
    state: Float[Array, "B T D"],
    observe: Callable[[jax.Array], Any],
    *,
    num_steps: int,
    backprop_depth: int,
    trains_state: bool = False,
    unroll: int = 1,
) -> Any:
    """Iterates a known number of times and looks at every state.

    Gradients flow through iterations as in `recur`. They reach whatever `observe` captures from all
    iterations, and the core from the last `backprop_depth`.

    Args:
      core: what its iterations are given.
      state: the state to begin with.
      observe: state -> pytree; recomputed in the backward pass, so that its inside is not stored.
      num_steps: static, at least 1.
      backprop_depth: static; more than `num_steps` counts as `num_steps`.
      trains_state: as of `recur`.
      unroll: as of `recur`.

    Returns:
      The observations, stacked along a new first axis of length `num_steps`.
    """
    num_stopped = max(num_steps - backprop_depth, 0)
    # What is observed is smaller than what it is computed from: logits of every iteration.
    observe = jax.checkpoint(observe)

    def advance(core: Pass) -> Callable[[jax.Array, jax.Array], Any]:
        def body(state: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
            state = core.iterate(state, step)
            return state, observe(state)

        return body

    parts = []
    if num_stopped or not trains_state:
        state = jax.lax.stop_gradient(state)
    if num_stopped:  # Else a loop of no turns would be compiled for nothing.
        state, early = jax.lax.scan(advance(core.stopped()), state, jnp.arange(num_stopped))
        parts.append(early)
    steps = jnp.arange(num_stopped, num_steps)
    _, late = jax.lax.scan(advance(core), state, steps, unroll=unroll)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts, late)


def first_iteration(num_steps: jax.Array, total: jax.Array) -> jax.Array:
    """The iteration in which each row or token joins, shaped to broadcast over [B, T, D]."""
    begin = total - num_steps
    return begin.reshape(begin.shape + (1,) * (3 - begin.ndim)) if begin.ndim else begin


def _own_number(step: jax.Array, begin: jax.Array) -> jax.Array:
    """The number of the iteration for rows that join at `begin`; 0 before."""
    number = jnp.maximum(step - begin, 0)
    return number[..., 0] if number.ndim else number


# ------------------------------------------------------------------------------
# The first state.


def initial_state(
    config: ModelConfig, key: Key[Array, ""] | None, injected: Float[Array, "B T D"]
) -> Float[Array, "B T W"]:
    """The state before the first iteration, as `recurrence.state_init` says.

    Args:
      config: the model.
      key: randomness; 'zero' and 'none' need none.
      injected: the embedding that every iteration is given, [B, T, core width].

    Returns:
      An array like `injected`; with hyper-connections one for each stream, all the same.

    Raises:
      ValueError: if a kind that needs a key has none.
    """
    first = _first_stream(config, key, injected)
    return begin_streams(first, config.recurrence.hyper_connections)


def _first_stream(config: ModelConfig, key: jax.Array | None, injected: jax.Array) -> jax.Array:
    kind, shape, dtype = config.recurrence.state_init, injected.shape, injected.dtype
    if kind == "zero":
        return jnp.zeros(shape, dtype)
    if kind == "none":
        return injected
    if key is None:
        raise ValueError(f"state_init={kind!r} draws the state at random; give a key")
    match kind:
        case "normal":
            return jax.random.normal(key, shape).astype(dtype)
        case "embed":
            return (jax.random.normal(key, shape) / jnp.sqrt(shape[-1])).astype(dtype)
        case "unit":
            state = jax.random.normal(key, shape)
            state = state - jnp.mean(state, axis=-1, keepdims=True)
            return (state / jnp.std(state, axis=-1, keepdims=True)).astype(dtype)
        case "like_init":
            std = weight_init(config, config.core_width).embedding_std
            state = truncated_normal(std)(key, shape, jnp.float32)
            return (state * embedding_scale(config)).astype(dtype)
    raise ValueError(f"unknown state_init {kind!r}")


# ------------------------------------------------------------------------------
# How many iterations the core makes in a training step.

# Sequential Poisson and geometric draws are integers of this type.
STEP_DTYPE = jnp.int32


def mean_at_step(config: RecurrenceConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The mean number of iterations at an optimiser step: the curriculum's ramp.

    Grows from `ramp_from` to `mean_steps` over `ramp_steps`: in proportion to t ('linear') or to
    1 - sqrt(1 - t) ('one_minus_sqrt'), slow at first and fast at the end, t in [0, 1]; or doubles
    in stages of equal length ('doubling').
    """
    if config.ramp == "none":
        return jnp.float32(config.mean_steps)
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / config.ramp_steps, 0.0, 1.0)
    if config.ramp == "doubling":
        stages = math.ceil(math.log2(config.mean_steps / config.ramp_from))
        # Rounded, as a stage must not begin a step late.
        stage = jnp.floor(jnp.round(progress * stages, 4))
        return jnp.minimum(config.ramp_from * 2.0**stage, config.mean_steps)
    if config.ramp == "one_minus_sqrt":
        progress = 1.0 - jnp.sqrt(1.0 - progress)
    return config.ramp_from + progress * (config.mean_steps - config.ramp_from)


def backprop_stage(config: RecurrenceConfig, step: Int[Array, ""] | int) -> Int[Array, ""]:
    """Which of `config.backprop_depths` the ramp has come to at an optimiser step, int32 []."""
    wanted = mean_at_step(config, step) * (config.backprop_depth / config.mean_steps)
    depths = jnp.asarray(config.backprop_depths[:-1], jnp.float32)
    return jnp.sum(depths < wanted - 1e-3, dtype=jnp.int32)


def draw_num_steps(
    config: RecurrenceConfig,
    key: Key[Array, ""],
    step: Int[Array, ""] | int,
    batch_size: int,
    length: int,
) -> Int[Array, "*draws"]:
    """Draws the number of iterations, 1 to `max_steps`, for a training step.

    Args:
      config: distribution, ramp and what gets a draw of its own.
      key: the run's key; the draw depends on (key, step) alone, so it is the same on every host
        and after a resume.
      step: optimiser step.
      batch_size: B.
      length: T.

    Returns:
      int32 [], [B] or [B, T], as `draw_per` says.
    """
    shapes = {"batch": (), "sequence": (batch_size,), "token": (batch_size, length)}
    mean = mean_at_step(config, step)
    draws = _sample(config, jax.random.fold_in(key, step), mean, shapes[config.draw_per])
    return jnp.clip(draws, 1, config.max_steps).astype(STEP_DTYPE)


def _sample(
    config: RecurrenceConfig, key: jax.Array, mean: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    match config.sampling:
        case "lognormal_poisson":
            return _lognormal_poisson(key, mean, config.sampling_sigma, shape)
        case "fixed":
            return jnp.broadcast_to(jnp.round(mean), shape)
        case "uniform":
            # 1 .. 2 * mean - 1, every value equally likely.
            highest = jnp.round(2 * mean).astype(STEP_DTYPE)
            return jax.random.randint(key, shape, 1, jnp.maximum(highest, 2), STEP_DTYPE)
        case "poisson":
            return jax.random.poisson(key, mean - 1.0, shape) + 1
        case "truncated_poisson":
            return _truncated_poisson(key, mean, config.max_steps, shape)
        case "geometric":
            return jax.random.geometric(key, 1.0 / mean, shape)
    raise ValueError(f"unknown sampling {config.sampling!r}; see RecurrenceConfig.sampling")


def _lognormal_poisson(
    key: jax.Array, mean: jax.Array, sigma: float, shape: tuple[int, ...]
) -> jax.Array:
    """Poisson(exp(normal)) + 1 (arXiv 2502.05171).

    The log-normal rate has mean `mean`, as upstream; so the draw's mean is mean + 1 less what the
    upstream `filling` variant's clamp takes off.
    """
    rate_key, count_key = jax.random.split(key)
    # A log-normal variable with this location has mean `mean`.
    location = jnp.log(mean) - sigma**2 / 2
    rate = jnp.exp(location + sigma * jax.random.normal(rate_key, shape))
    return jax.random.poisson(count_key, rate, shape) + 1


def _truncated_poisson(
    key: jax.Array, mean: jax.Array, max_steps: int, shape: tuple[int, ...]
) -> jax.Array:
    """Poisson(mean) given that it lies in 1 .. max_steps, by its exact probabilities."""
    values = jnp.arange(1, max_steps + 1)
    log_probability = values * jnp.log(mean) - jax.lax.lgamma(values + 1.0)
    return jax.random.categorical(key, log_probability, shape=shape) + 1
