"""The Jacobian of one iteration of the core: the squared size that stability training pushes down.

For a vector v of independent signs, E |J^T v|^2 = |J|_F^2 (Hutchinson's estimator). One product
J^T v is one pullback, so the penalty costs one more iteration and its second-order gradient. The
aim is that of STARS (arXiv 2605.26733), a small spectral radius, which |J|_F bounds from above.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.models.core_pass import core_step, open_core
from megatransformer_jax.models.megatransformer import MegaTransformer, with_xla_attention


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
        jax.Array, model.core().apply({"params": core.params}, injected, method="prepare")
    )
    step = core_step(model, core)
    _, pullback = jax.vjp(lambda state: step(core.params, state, prepared), state)
    probe = model.sharder.constrain(probe.astype(state.dtype), "batch", "length", None)
    (product,) = pullback(probe)
    return jnp.sum(jnp.square(product.astype(jnp.float32)))
