"""The core alone, for what looks at its iterations from outside of a forward pass.

Losses that read every iteration, the Jacobian, Admin's profile, diagnostics: all of it is without
dropout.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.models.core import initial_state, recur_observed
from megatransformer_jax.models.megatransformer import (
    MegaTransformer,
    pass_context,
    with_xla_attention,
)
from megatransformer_jax.nn.block import RESIDUAL_UPDATES, remat_policy
from megatransformer_jax.nn.context import LayerContext

# ------------------------------------------------------------------------------
# Everything that iterations of the core need, taken from one pass over a batch.


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
    module, remat = model.core_module(), model.config.remat

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


# ------------------------------------------------------------------------------
# The Jacobian of one iteration of the core: the squared size that stability training pushes down.
#
# For a vector v of independent signs, E |J^T v|^2 = |J|_F^2 (Hutchinson's estimator). One product
# J^T v is one pullback, so the penalty costs one more iteration and its second-order gradient. The
# aim is that of STARS (arXiv 2605.26733), a small spectral radius, which |J|_F bounds from above.


def random_signs(
    key: Key[Array, ""], mask: Float[Array, "B T"], width: int
) -> Float[Array, "B T D"]:
    """+1 or -1 in every channel of the positions that count, 0 elsewhere."""
    signs = jax.random.rademacher(key, (*mask.shape, width), jnp.float32)
    return jnp.where(mask[..., None] > 0, signs, 0.0)


def squared_jacobian(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    state: Float[Array, "B T D"],
    probe: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, ""]:
    """|J^T v|^2, J being the derivative by `state` of the iteration that follows it.

    Differentiable in the core's parameters only: the state and what is injected are taken as they
    are. Without dropout. Attention runs by the XLA kernel, as fused ones have no second derivative.

    Args:
      model: with a core.
      params: its parameters.
      tokens: token ids.
      state: the core's raw state.
      probe: v; the sum over positions where it is 0 leaves their rows of J out.
      positions: as in the forward pass.
      segment_ids: as in the forward pass.

    Raises:
      ValueError: if the model has no core.
    """
    model = with_xla_attention(model)
    core = open_core(model, params, tokens, positions=positions, segment_ids=segment_ids)
    injected, state = jax.lax.stop_gradient((core.injected, state))
    prepared = cast(
        jax.Array, model.core_module().apply({"params": core.params}, injected, method="prepare")
    )
    step = core_step(model, core)
    _, pullback = jax.vjp(lambda state: step(core.params, state, prepared), state)
    probe = model.sharder.constrain(probe.astype(state.dtype), "batch", "length", None)
    (product,) = pullback(probe)
    return jnp.sum(jnp.square(product.astype(jnp.float32)))


# ------------------------------------------------------------------------------
# Admin's profiling pass: where the weights of the residual stream start (arXiv 2004.08249).
#
# With post-norm, layer i computes x_i = norm(omega_i x_{i-1} + f_i(x_{i-1})). Admin starts omega_i
# at the standard deviation that the stream would have by then if nothing were normalised: omega_i^2
# = sum of Var[f_j] over j < i, measured with all omega at 1. f_0 is what enters the stream. The
# first layer's input is not normalised, so its omega stays 1, as in the authors' code.


def profile_admin(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    key: Key[Array, ""],
) -> Any:
    """Parameters whose omegas are set from one forward pass without dropout.

    Prelude, core and coda are a stream each, because the adapter and the norm behind the core stand
    between them; without a core, prelude and coda are one. The core is profiled in its first
    iteration, from its first state.

    Args:
      model: with `residual='admin'`.
      params: fresh parameters, all omegas 1.
      tokens: the first batch,
      positions: its positions,
      segment_ids: and its documents; padding (0) does not count.
      key: for the core's first state.

    Raises:
      ValueError: if the model's residual is another.
    """
    if model.config.residual != "admin":
        raise ValueError(
            f"residual={model.config.residual!r} has nothing to profile; it must be 'admin'"
        )
    sown = _updates(model, params, tokens, positions, segment_ids, key)
    params = jax.tree.map(lambda leaf: leaf, params)  # New dicts around the same arrays.
    streams = [["prelude"], ["core"], ["coda"]]
    for stacks in streams if model.config.is_recurrent else [["prelude", "coda"]]:
        places = [
            (stack, f"layer_{layer}", sublayer)
            for stack in stacks
            for layer in range(getattr(model.config, f"{stack}_layers"))
            for sublayer in ("attention", "mlp")
        ]
        variance = _variance(sown[stacks[0]]["stream"][0], segment_ids)
        for index, (stack, layer, sublayer) in enumerate(places):
            if index:
                blocks = params["core"]["layers"] if stack == "core" else params[stack]
                name = f"{sublayer}_residual_scale"
                blocks[layer][name] = jnp.full_like(blocks[layer][name], jnp.sqrt(variance))
            update = sown[stack][layer][f"{sublayer}_update"][0]
            variance += _variance(update, segment_ids)
    return params


def _updates(
    model: MegaTransformer,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    key: jax.Array,
) -> dict[str, Any]:
    """What the stacks sow in one pass with one iteration."""
    config = model.config
    variables = {"params": params}
    outer = pass_context(config, positions, segment_ids, config.width)
    x, sown = _apply(model, variables, tokens, positions, outer, method="run_prelude")
    if config.is_recurrent:
        core_params, injected, prepared = cast(Any, model.apply(variables, x, method="enter_core"))
        state = initial_state(config, key, injected)
        inner = pass_context(config, positions, segment_ids, config.core_width)
        x, of_core = _apply(model.core_module(), {"params": core_params}, state, prepared, inner)
        sown |= {"core": of_core["layers"]}
    _, of_coda = _apply(model, variables, x, outer, method="run_coda")
    return sown | of_coda


def _apply(
    module: Any, variables: Any, *arguments: Any, method: str | None = None
) -> tuple[Any, dict[str, Any]]:
    result, sown = module.apply(variables, *arguments, method=method, mutable=[RESIDUAL_UPDATES])
    return result, sown.get(RESIDUAL_UPDATES, {})


def _variance(array: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Float[Array, ""]:
    """Over all entries of all tokens that are not padding."""
    x = array.astype(jnp.float32)
    weight = jnp.broadcast_to((segment_ids > 0)[..., None], x.shape)
    mean = jnp.mean(x, where=weight)
    return jnp.mean(jnp.square(x - mean), where=weight)
