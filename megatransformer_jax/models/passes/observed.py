"""The core alone, for what looks at its iterations from outside of a forward pass.

Losses that read every iteration, the Jacobian, Admin's profile, diagnostics: all of it is without
dropout, but for a loss at every iteration in training.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.models.core import Pass, at_iteration, initial_state
from megatransformer_jax.models.megatransformer import (
    Entered,
    MegaTransformer,
    open_pass,
    pass_context,
    with_values,
)
from megatransformer_jax.nn.block import RESIDUAL_UPDATES
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# The pass through the core over one batch.


def open_core(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> Pass:
    """Runs embedding and prelude.

    Raises:
      ValueError: if the model has no core.
    """
    _check_core(model)
    arguments = (tokens, positions, segment_ids)
    entered: Any = model.apply({"params": params}, *arguments, method="enter")
    return _open(model, params, entered)


def open_batch(
    model: MegaTransformer, params: Any, batch: Batch, dropout_key: Key[Array, ""] | None = None
) -> tuple[Entered, Pass]:
    """The same for a batch, whose media are encoded; and where text and media are.

    With a key the pass has dropout, and so has whoever gives `Pass.dropout_key` to the coda.

    Raises:
      ValueError: if the model has no core.
    """
    _check_core(model)
    arguments = (batch.tokens, batch.positions, batch.segment_ids, batch.media)
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    enter = functools.partial(model.apply, method="enter", deterministic=dropout_key is None)
    entered: Any = enter({"params": params}, *arguments, rngs=rngs)
    return entered, _open(model, params, entered, dropout_key)


def _open(
    model: MegaTransformer,
    params: Any,
    entered: Entered,
    dropout_key: Key[Array, ""] | None = None,
) -> Pass:
    config, off = model.config, dropout_key is None
    inner, outer = (
        entered.context(config, width, off) for width in (config.core_width, config.width)
    )
    core: Any = open_pass(model, params, entered.x, inner)
    return cast(Pass, core.replace(outer=outer, dropout_key=dropout_key))


def _check_core(model: MegaTransformer) -> None:
    if not model.config.is_recurrent:
        raise ValueError(
            "this model has no core to iterate (model.core_layers=0); use a recurrent one."
        )


# ------------------------------------------------------------------------------
# The Jacobian of one iteration of the core: the squared size that stability training pushes down.
#
# For a vector v of independent signs, E |J^T v|^2 = |J|_F^2 (Hutchinson's estimator). One product
# J^T v is one pullback, so the penalty costs one more iteration and its second-order gradient. The
# released code of STARS (arXiv 2605.26733) computes the same. Its aim is a small spectral radius,
# which |J|_F bounds from above.


def random_signs(
    key: Key[Array, ""], mask: Float[Array, "B T"], width: int
) -> Float[Array, "B T D"]:
    """+1 or -1 in every channel of the positions that count, 0 elsewhere."""
    signs = jax.random.rademacher(key, (*mask.shape, width), jnp.float32)
    return jnp.where(mask[..., None] > 0, signs, 0.0)


def squared_jacobian(
    core: Pass,
    state: Float[Array, "B T D"],
    probe: Float[Array, "B T D"],
    iteration: Int[Array, "*draws"],
) -> Float[Array, ""]:
    """|J^T v|^2, J being the derivative by `state` of the iteration that follows it.

    Differentiable in the core's parameters only: the state and what is injected are taken as they
    are. Without dropout.

    Args:
      core: of a model with the XLA attention kernel (`with_xla_attention`), as fused ones have no
        second derivative.
      state: the core's raw state.
      probe: v; the sum over positions where it is 0 leaves their rows of J out.
      iteration: number of the iteration that follows, from 0: the iterations that made the state.
    """
    module = core.core
    injected, state = jax.lax.stop_gradient((core.injected, state))
    prepared = module.apply({"params": core.params}, injected, method="prepare")
    core = core.replace(prepared=prepared)  # type: ignore[attr-defined]
    _, pullback = jax.vjp(lambda state: core.iterate(state, iteration), state)
    probe = module.sharder.constrain(probe.astype(state.dtype), "batch", "length", None)
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
    outer = with_values(model, params, outer, tokens)
    x, sown = _apply(model, variables, tokens, positions, outer, method="run_prelude")
    if config.is_recurrent:
        inner = pass_context(config, positions, segment_ids, config.core_width)
        inner = dataclasses.replace(inner, value_embeddings=outer.value_embeddings)
        core = open_pass(model, params, x, inner)
        state = initial_state(config, key, core.injected)
        inner = at_iteration(config, core.context, 0)
        x, of_core = _apply(core.core, {"params": core.params}, state, core.prepared, inner)
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
