"""Matrices with a copy per device: values, gradients, where these are summed, what remat keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import count_in_loops
from jax.sharding import NamedSharding, PartitionSpec
from sharded_step import MESHES, OPTIMIZER, example_batch, run_config

from megatransformer_jax.compiled.hlo import parse_hlo
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.nn.cut_matrices import CutMatrix, cut_matrices
from megatransformer_jax.nn.quantized import einsum, multiply, take_rows
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import abstract_state
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import DTypePolicy

# Sizes that are no multiples of a TPU's tiles.
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
UP_AXES, UP_SHAPE = ("embed", None, "mlp"), (6, 2, 10)
OUTPUT_AXES, OUTPUT_SHAPE = ("heads", None, "embed"), (2, 3, 6)
TABLE_AXES, TABLE_SHAPE = ("vocab", "embed"), (8, 6)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 6)), jnp.float32)
IDS = jnp.asarray(np.random.default_rng(1).integers(0, 8, (8, 3)), jnp.int32)


@pytest.fixture(scope="module")
def sharder():
    return Sharder(make_mesh(MESH, jax.devices()))


def passes(x, ids, up, output, table):
    """Products as layers write them, in a loop, and a table that is looked up and a head."""
    x = x + take_rows(table, ids)

    def iterate(x, _):
        hidden = jnp.tanh(einsum("btd,dpf->btpf", x, up))
        return x + multiply(hidden[..., 0, :6], output.reshape(-1, 6)), None

    x, _ = jax.lax.scan(iterate, x, None, length=3)
    logits = einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
    return jnp.sum(jnp.sin(logits)), logits


def matrices():
    rng = np.random.default_rng(2)
    shapes = {"up": UP_SHAPE, "output": OUTPUT_SHAPE, "table": TABLE_SHAPE}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) / 3 for name, s in shapes.items()}


@pytest.mark.parametrize("is_spread", [False, True])
def test_a_matrix_is_rounded_before_it_is_gathered(sharder, is_spread):
    """Else float32 travels, as it did in programs for GPUs."""
    spec = sharder.rules.spec(*UP_AXES)
    shape = (2, *UP_SHAPE) if is_spread else UP_SHAPE
    placed = NamedSharding(sharder.mesh, PartitionSpec("data", *spec) if is_spread else spec)

    def loss(array, x):
        matrix = CutMatrix(array, UP_AXES, sharder, is_spread=is_spread).astype(jnp.bfloat16)
        return matrix.product("btd,dpf->btpf", x).sum()

    rows = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16, sharding=sharder.sharding("batch"))
    array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)
    module = parse_hlo(jax.jit(loss).lower(array, rows).compile().as_text())
    gathers = [op for op in module.main.ops.values() if op.opcode.startswith("all-gather")]
    assert gathers
    for op in gathers:
        sent = module.origin(module.main.operands(op)[0])
        assert sent.opcode != "parameter"  # What is sent was computed: it is the rounded array.


def test_values_and_gradients_are_those_of_one_matrix_and_are_summed_once(sharder):
    axes = {"up": UP_AXES, "output": OUTPUT_AXES, "table": TABLE_AXES}
    plain = matrices()
    expected, logits = jax.grad(lambda m: passes(X, IDS, **m), has_aux=True)(plain)

    def loss(cut, x, ids):
        copied = {name: CutMatrix(cut[name], axes[name], sharder).copied() for name in cut}
        return passes(x, ids, **copied)

    shardings = {name: sharder.sharding(*axes[name]) for name in axes}
    rows = sharder.sharding("batch", None)
    placed = jax.device_put(plain, shardings)
    x, ids = jax.device_put(X, sharder.sharding("batch", None, None)), jax.device_put(IDS, rows)

    step = jax.jit(lambda *inputs: jax.grad(loss, has_aux=True)(*inputs))
    compiled = step.lower(placed, x, ids).compile()
    gradients, ours = compiled(placed, x, ids)
    np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
        assert gradient.sharding.is_equivalent_to(shardings[name], gradient.ndim)
    text = compiled.as_text()
    in_loops, total = count_in_loops(text, "reduce-scatter")
    assert (in_loops, total) == (0, 3)
    assert count_in_loops(text, "all-gather")[0] == 0


def test_rows_that_no_mesh_cuts_and_meshes_without_fsdp_have_no_copies(sharder):
    params = {"core": {"mlp": {"up": jnp.ones(UP_SHAPE), "scale": jnp.ones(6)}}}
    axes = {"core": {"mlp": {"up": UP_AXES, "scale": (None,)}}}
    cut = cut_matrices(params, axes, sharder, num_rows=8)["core"]["mlp"]
    assert isinstance(cut["up"], CutMatrix)
    assert cut["scale"] is params["core"]["mlp"]["scale"]
    assert cut_matrices(params, axes, sharder, num_rows=6) is params
    assert cut_matrices(params, axes, Sharder(), num_rows=8) is params
    of_data = Sharder(make_mesh(MESHES["data"], jax.devices()))
    assert cut_matrices(params, axes, of_data, num_rows=8) is params


def test_remat_dots_keeps_products_with_copies(sharder):
    """Their axis of copies is a batch's to `dots_with_no_batch_dims_saveable`."""

    def num_products(remat):
        config = run_config()
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        model = build_model(config.model, DTypePolicy(), sharder, "cpu")
        state = abstract_state(model, OPTIMIZER)
        step = make_train_step(model, OPTIMIZER, config)
        return str(jax.make_jaxpr(step)(state, example_batch())).count("dot_general")

    assert num_products("none") < num_products("dots") < num_products("full")
