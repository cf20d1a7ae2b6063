"""Muon's matrices inside fused kernels, against singular value decompositions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.optimizer import MuonConfig, OptimizerConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.transforms import labels, muon_axes, scale_by_muon
from megatransformer_jax.types import DTypePolicy

SHAPES = {"qkv": (8, 2, 4, 3), "output": (4, 3, 8), "up": (8, 2, 6), "down": (6, 8)}


def matrices(name, array):
    """The matrices of a fused kernel, inputs by outputs, taken apart by hand."""
    match name:
        case "qkv":  # D, K, G+2, H
            return [array[:, :, place, :].reshape(8, -1) for place in range(4)]
        case "output":
            return [array.reshape(-1, 8)]
        case "up":
            return [array[:, part] for part in range(2)]
    return [array]


@pytest.fixture(scope="module")
def gradients():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def direction(gradients, **options):
    options = {"momentum": 0.0, "nesterov": False, "newton_schulz_steps": 5,
               "consistent_rms": None, **options}  # fmt: skip
    transform = scale_by_muon(**options)
    updates, _ = jax.jit(lambda g: transform.update(g, transform.init(g)))(gradients)
    return jax.tree.map(np.asarray, updates)


@pytest.fixture(scope="module")
def plain(gradients):
    return direction(gradients)


@pytest.mark.parametrize("name", SHAPES)
def test_the_direction_has_the_gradients_singular_vectors_and_values_near_1(gradients, plain, name):
    """The iteration keeps U and V and brings the singular values to within about 0.3 of 1."""
    for ours, gradient in zip(
        matrices(name, plain[name]), matrices(name, gradients[name]), strict=True
    ):
        u, s, vh = np.linalg.svd(gradient, full_matrices=False)
        assert s.max() / s.min() > 1.5  # Else it could have done nothing.
        inputs, outputs = gradient.shape
        inner = u.T @ ours @ vh.T / np.sqrt(max(1, outputs / inputs))
        np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-4)
        assert np.all((np.diag(inner) > 0.6) & (np.diag(inner) < 1.3))
        np.testing.assert_allclose(ours, u @ (u.T @ ours @ vh.T) @ vh, atol=1e-4)


def test_consistent_rms_is_that_of_every_matrix(gradients, plain):
    updates = direction(gradients, consistent_rms=0.2)
    for name in SHAPES:
        for matrix, width in zip(
            matrices(name, updates[name]), matrices(name, plain[name]), strict=True
        ):
            inputs, outputs = matrix.shape
            # An orthogonal matrix of full rank has an rms of 1 / sqrt(max(inputs, outputs)).
            assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.2, rel=0.3)
            ratio = 0.2 * np.sqrt(max(inputs, outputs)) / np.sqrt(max(1, outputs / inputs))
            np.testing.assert_allclose(matrix, ratio * width, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_each_step_applies_the_polynomial_to_the_singular_values(gradients, steps):
    u, s, vh = np.linalg.svd(gradients["down"].astype(np.float64), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    ours = direction({"down": gradients["down"]}, newton_schulz_steps=steps)["down"]
    np.testing.assert_allclose(ours, (u * s) @ vh * np.sqrt(8 / 6), atol=1e-4)


def test_momentum_is_that_of_the_formula(gradients):
    """The direction after two steps is that of the mixed momentum, with and without nesterov."""
    first, second = gradients["down"], gradients["down"][:, ::-1]
    ema = 0.1 * (0.9 * first + second)
    mixed = {False: ema, True: 0.9 * ema / (1 - 0.9**3) + 0.1 * second / (1 - 0.9**2)}
    for nesterov, momentum in mixed.items():
        transform = scale_by_muon(0.9, nesterov, 5, None)

        @jax.jit
        def two_steps(first, second, transform=transform):
            _, state = transform.update({"down": first}, transform.init({"down": first}))
            return transform.update({"down": second}, state)[0]["down"]

        expected = direction({"down": momentum})["down"]
        np.testing.assert_allclose(two_steps(first, second), expected, atol=1e-4)


def test_a_leading_axis_of_layers_is_one_matrix_per_layer(gradients, plain):
    stacked = {name: np.stack([g, 2 * g[..., ::-1]]) for name, g in gradients.items()}
    updates = direction(stacked)
    for name in SHAPES:
        np.testing.assert_allclose(updates[name][0], plain[name], atol=1e-4)


@pytest.mark.parametrize("adapter", ["linear", "diagonal"])
def test_every_parameter_of_a_real_model_is_sorted(adapter):
    """A new matrix must be given to one of the two here, knowingly."""
    config = ModelConfig(
        vocab_size=32,
        width=16,
        attention=AttentionConfig(num_heads=2, qkv_bias=True, output_bias=True, qk_bias=True),
        mlp=MlpConfig(hidden_width=8, bias=True),
        tie_embeddings=False,
        head_bias=True,
        recurrence=RecurrenceConfig(adapter=adapter),
    )
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    flat = jax.tree_util.tree_leaves_with_path(labels(params))
    by_muon = {path[-1].key for path, label in flat if label == "muon"}
    adapter_names = set() if adapter == "diagonal" else {"state_kernel", "embedding_kernel"}
    assert by_muon == {"qkv", "output", "up", "down"} | adapter_names
    by_adamw = {path[-1].key for path, label in flat if label == "adamw"}
    assert {"embedding", "head", "scale", "query_bias"} <= by_adamw
    ranks = {path[-1].key: leaf.ndim for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    matrices_of_adamw = {
        name for name in by_adamw if ranks[name] > 1 and not name.endswith(("bias", "scale"))
    }
    assert matrices_of_adamw <= {"embedding", "head", "b_matrix"}
    assert jax.tree.structure(muon_axes(params), is_leaf=lambda x: x is None or isinstance(
        x, optax.contrib.MuonDimensionNumbers)) == jax.tree.structure(params)  # fmt: skip


def test_the_rest_gets_adamw_at_its_own_rate(gradients):
    values = {"schedule": "constant", "warmup_steps": 0, "clip_norm": None, "weight_decay": 0.0}
    rates = {"adamw_learning_rate": 0.25}
    params = {"up": jnp.asarray(gradients["up"]), "scale": jnp.arange(1.0, 4.0)}
    muon = build_optimizer(OptimizerConfig(name="muon", muon=MuonConfig(**rates), **values), 10)
    plain = build_optimizer(OptimizerConfig(name="muon", **values), 10)
    adamw = build_optimizer(OptimizerConfig(name="adamw", **values), 10)
    ours, default, theirs = (
        jax.jit(optimizer.update)(params, optimizer.init(params), params)[0]
        for optimizer in (muon, plain, adamw)
    )
    np.testing.assert_allclose(ours["scale"], 0.25 * theirs["scale"], rtol=1e-6)
    np.testing.assert_allclose(default["scale"], theirs["scale"], rtol=1e-6)
    np.testing.assert_array_equal(ours["up"], default["up"])
    assert np.abs(ours["up"] - theirs["up"]).max() > 1e-4
