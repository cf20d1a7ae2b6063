"""Our own optax transformations: Muon for fused kernels, Grokfast, an average of the weights."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.training.trainable import map_named

# ------------------------------------------------------------------------------
# Muon: which parameters it makes orthogonal, and as which matrices.

# Axes counted from the end, inputs and outputs of a matrix; what is left are separate matrices.
#
# A fused kernel holds several maps of the same input, whose gradients differ in size; made
# orthogonal as one matrix, the largest would set the pace of the others. So each is a matrix by
# itself:
#   qkv [D, K, G+2, H]: per place in the group, D x (K H). With K = N heads these are the query, key
#     and value matrices; with grouped queries there are G query matrices of K heads each.
#   up [D, 2, F]: gate and up, D x F each.
#   output [N, H, D]: heads are inputs together, (N H) x D.
# A leading axis of layers, if there is one, is left over too: a matrix per layer.
_AXES = {
    "qkv": ((-4,), (-3, -1)),
    "output": ((-3, -2), (-1,)),
    "up": ((-3,), (-1,)),
    "down": ((-2,), (-1,)),
    "state_kernel": ((-2,), (-1,)),
    "embedding_kernel": ((-2,), (-1,)),
}


def muon_axes(params: Any) -> Any:
    """A tree with `optax.contrib.MuonDimensionNumbers` for Muon's parameters, None for AdamW's.

    Goes by name, so that what is not known as a matrix between activations stays with AdamW:
    embeddings and the head (rows looked up by token), experts' tables, vectors, and the diagonal
    adapter, whose matrix starts as the identity and has no decay.
    """
    return map_named(_axes_of, params)


def scale_by_muon(
    momentum: float, nesterov: bool, newton_schulz_steps: int, consistent_rms: float | None
) -> optax.GradientTransformation:
    """Momentum made orthogonal, scaled by the matrix's shape; for Muon's parameters alone.

    Args:
      momentum: decay of the momentum.
      nesterov: whether it looks ahead.
      newton_schulz_steps: iterations that bring the singular values near 1.
      consistent_rms: root mean square of an update of full rank (arXiv 2502.16982): the orthogonal
        matrix times consistent_rms sqrt(max(inputs, outputs)). None: times
        sqrt(max(1, outputs / inputs)), as Muon's author has it.

    Examples:
      >>> optimizer = optax.chain(scale_by_muon(0.95, True, 5, 0.2), optax.scale(-1e-3))
      >>> state = optimizer.init({"up": jnp.ones((8, 2, 16))})
    """
    orthogonal = optax.contrib.scale_by_muon(
        ns_steps=newton_schulz_steps,
        beta=momentum,
        nesterov=nesterov,
        mu_dtype=jnp.float32,
        weight_dimension_numbers=muon_axes,
    )
    return optax.chain(orthogonal, scale_by_shape(consistent_rms))


def scale_by_shape(consistent_rms: float | None) -> optax.GradientTransformation:
    """The last part of Muon, see `scale_by_muon`."""

    def scale(update: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        inputs, outputs = matrix_sides(update, axes)
        if consistent_rms is None:
            return update * math.sqrt(max(1.0, outputs / inputs))
        return update * (consistent_rms * math.sqrt(max(inputs, outputs)))

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, muon_axes(updates)))


def matrix_sides(array: Any, axes: optax.contrib.MuonDimensionNumbers) -> tuple[int, int]:
    """Inputs and outputs of the matrices in a kernel."""
    inputs = math.prod(array.shape[axis] for axis in axes.reduction_axis)
    return inputs, math.prod(array.shape[axis] for axis in axes.output_axis)


def labels(params: Any) -> Any:
    """A tree of 'muon' and 'adamw', for `optax.partition`."""
    return map_named(lambda path, leaf: "muon" if _axes_of(path, leaf) else "adamw", params)


def check_muon(params: Any) -> None:
    """Checks that Muon has something to act on.

    Raises:
      ConfigError: if AdamW would get all parameters.
    """
    if "muon" not in jax.tree.leaves(labels(params)):
        raise ConfigError(
            "optimizer.name",
            "'muon' acts on none of the parameters that are trained, only on matrices of layers "
            f"({', '.join(_AXES)}); set it to 'adamw', or let fine_tuning train some of these.",
        )


def _axes_of(path: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    del leaf
    axes = _AXES.get(path.rpartition("/")[2])
    return None if axes is None else optax.contrib.MuonDimensionNumbers(*axes)


# ------------------------------------------------------------------------------
# Grokfast (arXiv 2405.20233): gradients with their slow part amplified, as optax transformations.
#
# The paper holds that parameters which generalise move with the slow part of the gradients; adding
# more of it shortens the wait for grokking.


class GrokfastEmaState(NamedTuple):
    """State of `grokfast_ema`."""

    average: Any  # tree of the gradients


class GrokfastMaState(NamedTuple):
    """State of `grokfast_ma`."""

    count: Any  # int32 [], gradients so far
    gradients: Any  # tree of the gradients, each [window, ...]: a ring


def grokfast_ema(
    alpha: jax.typing.ArrayLike = 0.98, lamb: jax.typing.ArrayLike = 2.0
) -> optax.GradientTransformation:
    """h = alpha h + (1 - alpha) g from h = 0; the gradient becomes g + lamb h.

    Args:
      alpha: decay of the average, in [0, 1).
      lamb: how much of the average is added.

    Examples:
      >>> optimizer = optax.chain(grokfast_ema(0.98, 2.0), optax.adamw(1e-3))
      >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """

    def init(params: Any) -> GrokfastEmaState:
        return GrokfastEmaState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: GrokfastEmaState, params: Any = None
    ) -> tuple[Any, GrokfastEmaState]:
        del params
        average = jax.tree.map(
            lambda h, g: (alpha * h + (1 - alpha) * g).astype(h.dtype), state.average, updates
        )
        return _amplified(updates, average, lamb), GrokfastEmaState(average)

    return optax.GradientTransformation(init, update)


def grokfast_ma(
    window: int = 100, lamb: jax.typing.ArrayLike = 5.0, warmup: bool = True
) -> optax.GradientTransformation:
    """The gradient becomes g + lamb times the mean of the last `window`, g included.

    It keeps `window` copies of the gradients.

    Args:
      window: gradients in the mean, at least 1.
      lamb: how much of the mean is added.
      warmup: adds nothing until there are `window` gradients, as the paper does. False: adds the
        mean of those there are.

    Raises:
      ValueError: if `window` is below 1.

    Examples:
      >>> optimizer = optax.chain(grokfast_ma(window=100, lamb=5.0), optax.adamw(1e-3))
      >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """
    if window < 1:
        raise ValueError(f"window={window}: the mean needs at least 1 gradient")

    def init(params: Any) -> GrokfastMaState:
        ring = jax.tree.map(lambda p: jnp.zeros((window, *p.shape), p.dtype), params)
        return GrokfastMaState(jnp.zeros([], jnp.int32), ring)

    def update(
        updates: Any, state: GrokfastMaState, params: Any = None
    ) -> tuple[Any, GrokfastMaState]:
        del params
        place = state.count % window
        ring = jax.tree.map(
            lambda kept, g: kept.at[place].set(g.astype(kept.dtype)), state.gradients, updates
        )
        count = optax.safe_increment(state.count)
        filled = jnp.minimum(count, window)
        weight = jnp.where((filled == window) | (not warmup), lamb, 0.0)
        mean = jax.tree.map(lambda kept: jnp.sum(kept, axis=0) / filled, ring)
        return _amplified(updates, mean, weight), GrokfastMaState(count, ring)

    return optax.GradientTransformation(init, update)


def _amplified(updates: Any, slow: Any, lamb: jax.typing.ArrayLike) -> Any:
    return jax.tree.map(lambda g, h: (g + lamb * h).astype(g.dtype), updates, slow)


# ------------------------------------------------------------------------------
# An exponential average of the weights, kept next to the optimiser's state.


class WeightAverageState(NamedTuple):
    """State of `average_weights`."""

    inner_state: Any
    average: Any  # tree of the parameters
    count: Any  # int32 [], updates so far


def average_weights(
    inner: optax.GradientTransformation, decay: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` and averages the weights that its updates lead to.

    After update t: average += (1 - d) (weights - average) with d = min(decay, (1 + t) / (10 + t)).
    The average starts as the initial weights; the smaller decay of early steps makes it forget
    them (after 10 updates they weigh 6e-5), so that it can be used at any time without a
    correction.

    Being part of the optimiser's state, the average is left alone where a step is skipped, and it
    is saved, restored and sharded with it.

    Args:
      inner: what makes the updates.
      decay: in (0, 1); the average looks back over about 1 / (1 - decay) updates.

    Examples:
      >>> optimizer = average_weights(optax.adamw(1e-3), decay=0.999)
      >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
      >>> state.average["kernel"].shape
      (2, 2)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> WeightAverageState:
        # A copy: a donated train state may not hold one buffer twice.
        average = jax.tree.map(jnp.copy, params)
        return WeightAverageState(inner.init(params), average, jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: WeightAverageState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, WeightAverageState]:
        if params is None:
            raise ValueError("averaging needs the parameters: update(updates, state, params)")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        kept = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
        average = jax.tree.map(
            lambda mean, p: mean + ((1.0 - kept) * (p - mean)).astype(mean.dtype),
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, WeightAverageState(inner_state, average, count)

    return optax.GradientTransformationExtraArgs(init, update)
