"""Muon with what Parcae and nanochat add to it: a growing momentum, other polynomials, normed rows.

`transforms.scale_by_muon` is the plain one, by optax. This one has the same state, and the same
updates as long as all that it adds is off.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from megatransformer_jax.config.optimizer import MuonConfig
from megatransformer_jax.training.transforms import matrix_sides, muon_axes, scale_by_shape

# ------------------------------------------------------------------------------
# Momentum, and the orthogonal matrix that is made of it.

# Coefficients of x, x^3 and x^5 in singular values x. The first are Muon's own, for any iteration.
QUINTIC = (3.4445, -4.7750, 2.0315)
# The best polynomials for singular values from 0.001 to 1, one after the other, with room for
# rounding (arXiv 2505.16932, algorithm 1, as published with its code).
POLAR_EXPRESS: tuple[tuple[float, float, float], ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# How far below 1 they need the largest singular value to start.
POLAR_EXPRESS_ROOM = 1.02
_EPS = 1e-8  # optax's, added to a matrix's norm.


def scale_by_configured_muon(config: MuonConfig) -> optax.GradientTransformation:
    """The direction of `optimizer.name='muon'` for Muon's parameters, with every option.

    Examples:
      >>> config = MuonConfig(momentum_from=0.85, momentum_warmup_steps=300)
      >>> optimizer = optax.chain(scale_by_configured_muon(config), optax.scale(-1e-3))
      >>> state = optimizer.init({"up": jnp.ones((8, 2, 16))})
    """
    parts = [_orthogonal_momentum(config)]
    if config.row_decay is not None:
        parts.append(normalize_rows(config.row_decay))
    return optax.chain(*parts, scale_by_shape(config.consistent_rms))


def momentum_at(config: MuonConfig, step: jax.typing.ArrayLike) -> jax.Array:
    """The momentum of the step that comes after `step` steps, float32 []."""
    if config.momentum_from is None:
        return jnp.float32(config.momentum)
    progress = jnp.minimum(jnp.asarray(step, jnp.float32) / config.momentum_warmup_steps, 1.0)
    return config.momentum_from + progress * (config.momentum - config.momentum_from)


def _orthogonal_momentum(config: MuonConfig) -> optax.GradientTransformation:
    def init(params: Any) -> optax.contrib.MuonState:
        return optax.contrib.MuonState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=jnp.float32),
            ns_coeffs=jnp.asarray(QUINTIC),  # Not read: `config` decides.
        )

    def update(
        updates: Any, state: optax.contrib.MuonState, params: Any = None
    ) -> tuple[Any, optax.contrib.MuonState]:
        del params
        momentum = momentum_at(config, state.count)
        mu = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.mu, updates)
        count = optax.safe_increment(state.count)
        mixed = _look_ahead(config, updates, mu, momentum, count)
        orthogonal = jax.tree.map(
            lambda matrix, axes: _orthogonalize(config, matrix, axes), mixed, muon_axes(mixed)
        )
        return orthogonal, optax.contrib.MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def _look_ahead(
    config: MuonConfig, updates: Any, mu: Any, momentum: jax.Array, count: jax.Array
) -> Any:
    """What is made orthogonal: the momentum, or with nesterov its mixture with the gradient."""
    if not config.nesterov:
        return mu  # Its length does not matter, so neither does its start at zero.
    if config.momentum_from is None:  # As optax corrects for it.
        mu = optax.tree.bias_correction(mu, config.momentum, optax.safe_increment(count))
        updates = optax.tree.bias_correction(updates, config.momentum, count)
    return jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, mu, updates)


def _orthogonalize(
    config: MuonConfig, kernel: jax.Array, axes: optax.contrib.MuonDimensionNumbers
) -> jax.Array:
    """Each matrix of a kernel with its singular values brought near 1."""
    inputs = tuple(axis % kernel.ndim for axis in axes.reduction_axis)
    outputs = tuple(axis % kernel.ndim for axis in axes.output_axis)
    others = tuple(axis for axis in range(kernel.ndim) if axis not in (*inputs, *outputs))
    order = (*others, *inputs, *outputs)
    ordered = kernel.transpose(order)
    x = ordered.reshape(*ordered.shape[: len(others)], *matrix_sides(kernel, axes))
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x  # The products are then those of the shorter side.
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    if config.polynomial == "polar_express":
        x, polynomials = x / (norm * POLAR_EXPRESS_ROOM + _EPS), POLAR_EXPRESS
    else:
        x, polynomials = x / (norm + _EPS), (QUINTIC,) * config.newton_schulz_steps
    for a, b, c in polynomials[: config.newton_schulz_steps]:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    x = x.mT if is_tall else x
    back = sorted(range(kernel.ndim), key=order.__getitem__)
    return x.reshape(ordered.shape).transpose(back)


# ------------------------------------------------------------------------------
# Rows of the orthogonal matrix brought to one size.

_SMALLEST = 1e-10


class RowState(NamedTuple):
    """State of `normalize_rows`: mean squares, shaped as the kernels with axes of length 1."""

    mean_squares: Any


def normalize_rows(decay: float) -> optax.GradientTransformation:
    """Divides each row of a matrix by the root of its mean square, averaged over steps; the norm of
    the whole matrix stays.

    A row is what one output gets, or what one input gives if there are more of these. So neurons
    learn at one pace, of which some get little from an orthogonal matrix with more rows than
    columns.

    Args:
      decay: of the average.

    Examples:
      >>> optimizer = optax.chain(normalize_rows(0.95), optax.scale(-1e-3))
      >>> rows, _ = optimizer.init({"up": jnp.ones((8, 2, 16))})
      >>> rows.mean_squares["up"].shape
      (1, 2, 16)
    """

    def init(params: Any) -> RowState:
        def zeros(kernel: Any, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
            return jnp.sum(jnp.zeros_like(kernel), axis=_short_side(kernel, axes), keepdims=True)

        return RowState(jax.tree.map(zeros, params, muon_axes(params)))

    def update(updates: Any, state: RowState, params: Any = None) -> tuple[Any, RowState]:
        del params
        axes = muon_axes(updates)

        def mean_square(old: jax.Array, kernel: jax.Array, axes: Any) -> jax.Array:
            new = jnp.mean(jnp.square(kernel), axis=_short_side(kernel, axes), keepdims=True)
            return decay * old + (1 - decay) * new

        def scale(kernel: jax.Array, mean_square: jax.Array, axes: Any) -> jax.Array:
            scaled = kernel * jax.lax.rsqrt(jnp.maximum(mean_square, _SMALLEST))
            sides = (*axes.reduction_axis, *axes.output_axis)
            norm, scaled_norm = (
                jnp.sqrt(jnp.sum(jnp.square(x), axis=sides, keepdims=True))
                for x in (kernel, scaled)
            )
            return scaled * (norm / jnp.maximum(scaled_norm, _SMALLEST))

        averages = jax.tree.map(mean_square, state.mean_squares, updates, axes)
        return jax.tree.map(scale, updates, averages, axes), RowState(averages)

    return optax.GradientTransformation(init, update)


def _short_side(kernel: Any, axes: optax.contrib.MuonDimensionNumbers) -> tuple[int, ...]:
    """Axes of the inputs, or of the outputs if there are fewer of these."""
    inputs, outputs = matrix_sides(kernel, axes)
    return tuple(axes.reduction_axis if inputs <= outputs else axes.output_axis)
