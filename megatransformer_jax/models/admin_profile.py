"""Admin's profiling pass: where the weights of the residual stream start (arXiv 2004.08249).

With post-norm, layer i computes x_i = norm(omega_i x_{i-1} + f_i(x_{i-1})). Admin starts omega_i at
the standard deviation that the stream would have by then if nothing were normalised:
omega_i^2 = sum of Var[f_j] over j < i, measured with all omega at 1. f_0 is what enters the stream.
The first layer's input is not normalised, so its omega stays 1, as in the authors' code.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.models.megatransformer import MegaTransformer, pass_context
from megatransformer_jax.models.state_init import initial_state
from megatransformer_jax.nn.block import RESIDUAL_UPDATES


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
        x, of_core = _apply(model.core(), {"params": core_params}, state, prepared, inner)
        sown |= {"core": of_core["layers"]}
    _, of_coda = _apply(model, variables, x, outer, method="run_coda")
    return sown | of_coda


def _apply(
    module: Any, variables: Any, *arguments: Any, method: str | None = None
) -> tuple[Any, dict[str, Any]]:
    result, sown = module.apply(variables, *arguments, method=method, mutable=[RESIDUAL_UPDATES])
    return result, sown.get(RESIDUAL_UPDATES, {})


def _variance(array: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]) -> Float[Array, ""]:
    """Over all entries of all tokens that are no padding."""
    x = array.astype(jnp.float32)
    weight = jnp.broadcast_to((segment_ids > 0)[..., None], x.shape)
    mean = jnp.mean(x, where=weight)
    return jnp.mean(jnp.square(x - mean), where=weight)
