"""Meshes of the eight fake devices, and a tiny model on each of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.megatransformer import build_model, init_params, param_axes
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}
CAPACITY, DEPTH = 64, 4
CONFIG = ModelConfig(
    vocab_size=32,
    width=16,
    max_length=CAPACITY,
    core_layers=1,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    mlp=MlpConfig(hidden_width=24),
    recurrence=RecurrenceConfig(mean_steps=DEPTH, state_init="normal"),
)


@functools.cache
def host_params():
    params = init_params(build_model(CONFIG, DTypePolicy(), Sharder(), "cpu"), jax.random.key(0))
    # Fresh models score all tokens alike; noise tells them apart.
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(x + 0.3 * rng.standard_normal(x.shape)), params)


@functools.cache
def model_and_params(mesh_name):
    """On a mesh, or on one device if it has no name."""
    sharder = Sharder()
    if mesh_name is not None:
        sharder = Sharder(make_mesh(MESHES[mesh_name], jax.devices()))
    model = build_model(CONFIG, DTypePolicy(), sharder, "cpu")
    params = host_params()
    if mesh_name is None:
        return model, jax.tree.map(jnp.asarray, params)
    shardings = jax.tree.map(lambda _, axes: sharder.sharding(*axes), params, param_axes(model))
    return model, jax.device_put(params, shardings)
