"""Parcae's Muon against a step written out in NumPy, matrix by matrix, after its description."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.config.optimizer import MuonConfig, OptimizerConfig
from megatransformer_jax.training.muon import (
    POLAR_EXPRESS,
    QUINTIC,
    momentum_at,
    normalize_rows,
    scale_by_configured_muon,
)
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.transforms import scale_by_muon

SHAPES = {"qkv": (8, 2, 4, 3), "output": (4, 3, 8), "up": (8, 2, 12), "down": (12, 8)}
PARCAE = MuonConfig(
    momentum_from=0.85,
    momentum_warmup_steps=3,
    polynomial="polar_express",
    row_decay=0.9,
    consistent_rms=None,
)
STEPS = 5


def as_matrices(name, array):
    """The matrices of a fused kernel, outputs by inputs as PyTorch has them."""
    match name:
        case "qkv":  # D, K, G+2, H
            return [array[:, :, place, :].reshape(8, -1).T for place in range(4)]
        case "output":
            return [array.reshape(-1, 8).T]
        case "up":
            return [array[:, part].T for part in range(2)]
    return [array.T]


@pytest.fixture(scope="module")
def gradients():
    """Of five steps; some rows are much smaller than others."""
    rng = np.random.default_rng(0)

    def draw(shape):
        return (rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1]))).astype(np.float32)

    return [{name: draw(shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]


def updates_of(transform, gradients, params=None):
    update = jax.jit(transform.update)
    state, history = transform.init(gradients[0] if params is None else params), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        history.append(jax.tree.map(np.asarray, updates))
        if params is not None:
            params = optax.apply_updates(params, updates)
    return history


def muon_in_numpy(matrices, momenta, b2, polynomials):
    """Updates of one matrix [outputs, inputs], before the learning rate."""
    m, v, history = np.zeros_like(matrices[0]), 0.0, []
    for g, mom in zip(matrices, momenta, strict=True):
        m = mom * m + (1 - mom) * g
        x = (1 - mom) * g + mom * m
        x = x / (1.02 * np.linalg.norm(x))
        for a, b, c in polynomials:
            square = x @ x.T
            x = a * x + b * square @ x + c * square @ square @ x
        axis = 1 if x.shape[0] >= x.shape[1] else 0
        v = b2 * v + (1 - b2) * np.mean(x**2, axis=axis, keepdims=True)
        scaled = x / np.sqrt(np.maximum(v, 1e-10))
        x = scaled * np.linalg.norm(x) / np.linalg.norm(scaled)
        history.append(x * np.sqrt(max(1, x.shape[0] / x.shape[1])))
    return history


@pytest.mark.parametrize("name", SHAPES)
def test_parcaes_muon_equals_the_formulas(gradients, name):
    ours = updates_of(scale_by_configured_muon(PARCAE), gradients)
    momenta = [0.85 + 0.1 * min(step / 3, 1) for step in range(STEPS)]
    inputs = [as_matrices(name, step[name].astype(np.float64)) for step in gradients]
    for place in range(len(inputs[0])):
        expected = muon_in_numpy([step[place] for step in inputs], momenta, 0.9, POLAR_EXPRESS)
        for step in range(STEPS):
            found = as_matrices(name, ours[step][name])[place]
            np.testing.assert_allclose(found, expected[step], atol=2e-4)


@pytest.mark.parametrize("nesterov", [True, False])
def test_with_all_additions_off_it_is_the_plain_one(gradients, nesterov):
    config = MuonConfig(nesterov=nesterov, momentum=0.9)
    ours = updates_of(scale_by_configured_muon(config), gradients[:3])
    plain = updates_of(scale_by_muon(0.9, nesterov, 5, 0.2), gradients[:3])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), ours, plain)


def test_the_plain_one_is_still_used_where_it_can_be():
    assert MuonConfig().is_plain and not PARCAE.is_plain
    params = {"up": jnp.ones((2, 1, 2))}
    states = [
        build_optimizer(OptimizerConfig(name="muon", muon=muon), 100).init(params)
        for muon in (
            MuonConfig(),
            MuonConfig(polynomial="polar_express", newton_schulz_steps=3),
            MuonConfig(momentum_from=0.5, momentum_warmup_steps=2),
        )
    ]
    # So these may be changed when a run is resumed.
    shapes = [jax.tree.map(jnp.shape, state) for state in states]
    assert shapes[0] == shapes[1] == shapes[2]


def test_polar_express_brings_small_singular_values_closer_to_1():
    def worst(polynomials, room):
        values = np.geomspace(3e-3, 1, 50) / room
        for a, b, c in polynomials:
            values = a * values + b * values**3 + c * values**5
        return np.abs(values - 1).max()

    assert worst(POLAR_EXPRESS, 1.02) < 0.15
    assert worst([QUINTIC] * 5, 1.0) > 0.3


def test_momentum_grows_and_stays():
    config = MuonConfig(momentum=0.95, momentum_from=0.85, momentum_warmup_steps=10)
    found = [float(momentum_at(config, step)) for step in (0, 5, 10, 1000)]
    np.testing.assert_allclose(found, [0.85, 0.90, 0.95, 0.95], rtol=1e-6)
    assert float(momentum_at(MuonConfig(momentum=0.7), 0)) == pytest.approx(0.7)


def test_rows_come_to_one_size_and_the_matrix_keeps_its_norm(gradients):
    first = gradients[0]
    updates = updates_of(normalize_rows(0.9), [first])[0]
    for name in SHAPES:
        pairs = zip(as_matrices(name, updates[name]), as_matrices(name, first[name]), strict=True)
        for row_normed, matrix in pairs:
            assert np.linalg.norm(row_normed) == pytest.approx(np.linalg.norm(matrix), rel=1e-4)
            longer = row_normed if matrix.shape[0] >= matrix.shape[1] else row_normed.T
            # After one step the average is the step's own mean square.
            np.testing.assert_allclose(
                np.linalg.norm(longer, axis=1), np.linalg.norm(longer[0]), rtol=1e-3
            )


def test_the_whole_step_decays_with_caution_and_less_and_less(gradients):
    """Learning rate, fading cautious decay and Muon together, for a matrix [outputs, inputs]."""
    config = OptimizerConfig(
        name="muon",
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        final_fraction=0.1,
        clip_norm=None,
        weight_decay=0.2,
        weight_decay_schedule="linear",
        cautious_decay=True,
        muon=PARCAE,
    )
    down = [{"down": step["down"]} for step in gradients]
    params = {"down": jnp.asarray(gradients[0]["down"][::-1])}
    ours = updates_of(build_optimizer(config, 10), down, params)
    momenta = [0.85 + 0.1 * min(step / 3, 1) for step in range(STEPS)]
    matrices = [step["down"].T.astype(np.float64) for step in down]
    weight = np.asarray(params["down"]).T.astype(np.float64)
    for step, g in enumerate(muon_in_numpy(matrices, momenta, 0.9, POLAR_EXPRESS)):
        decay = 0.2 * (1 - step / 10)
        change = -0.1 * g - 0.1 * decay * weight * (g * weight >= 0)
        np.testing.assert_allclose(ours[step]["down"].T, change, atol=1e-4)
        weight = weight + change
