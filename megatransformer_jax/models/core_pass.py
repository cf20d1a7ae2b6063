"""The core alone: everything that its iterations need, taken from one pass over a batch.

For what looks at iterations from outside of a forward pass: losses that read every iteration,
Jacobians, diagnostics. All of it is without dropout.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.models.megatransformer import MegaTransformer, pass_context
from megatransformer_jax.models.recurrence import recur_observed
from megatransformer_jax.models.state_init import initial_state
from megatransformer_jax.nn.block import remat_policy
from megatransformer_jax.nn.context import LayerContext


@struct.dataclass
class CorePass:
    """What the iterations over one batch are given.

    Attributes:
      params: the core's weights, in the compute type and whole on every fsdp device.
      injected: the prelude's output as it enters the core.
      prepared: its part of every iteration, see `RecurrentCore.prepare`.
      context: masks and positions for the core's layers.
      outer: the same for the layers around the core.
    """

    params: Any
    injected: Float[Array, "B T D"]
    prepared: Float[Array, "B T D"]
    context: LayerContext
    outer: LayerContext


def open_core(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> CorePass:
    """Runs embedding and prelude.

    Raises:
      ValueError: if the model has no core.
    """
    config = model.config
    if not config.is_recurrent:
        raise ValueError(
            "this model has no core to iterate (model.core_layers=0); use a recurrent one."
        )
    outer = pass_context(config, positions, segment_ids, config.width)
    variables = {"params": params}
    x = model.apply(variables, tokens, positions, outer, method="run_prelude")
    core_params, injected, prepared = cast(Any, model.apply(variables, x, method="enter_core"))
    inner = pass_context(config, positions, segment_ids, config.core_width)
    return CorePass(core_params, injected, prepared, inner, outer)


def core_step(
    model: MegaTransformer, core: CorePass
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """One iteration as a pure function (core's params, state, prepared injection) -> state.

    Rematerialised as `model.remat` says.
    """
    module, remat = model.core(), model.config.remat

    def step(params: Any, state: jax.Array, prepared: jax.Array) -> jax.Array:
        return cast(jax.Array, module.apply({"params": params}, state, prepared, core.context))

    return step if remat == "none" else jax.checkpoint(step, policy=remat_policy(remat))


def first_state(
    model: MegaTransformer, core: CorePass, key: Key[Array, ""]
) -> Float[Array, "B T D"]:
    """The state before the first iteration, as `recurrence.state_init` says."""
    state = initial_state(model.config, key, core.injected).astype(core.injected.dtype)
    return model.sharder.constrain(jnp.asarray(state), "batch", "length", None)


def observe_iterations(
    model: MegaTransformer,
    core: CorePass,
    state: Float[Array, "B T D"],
    observe: Callable[[jax.Array], Any],
    *,
    num_steps: int,
    backprop_depth: int,
) -> Any:
    """Iterates the core and looks at every state; arguments as in `recur_observed`."""
    step = core_step(model, core)

    def iterate(
        params: Any, state: jax.Array, prepared: jax.Array, iteration: jax.Array
    ) -> jax.Array:
        del iteration  # Only dropout would need it.
        return step(params, state, prepared)

    return recur_observed(
        iterate,
        core.params,
        core.prepared,
        state,
        observe,
        num_steps=num_steps,
        backprop_depth=backprop_depth,
    )
