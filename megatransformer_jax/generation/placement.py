"""Where a generation's arrays are on a mesh.

Rows (texts) are cut over the mesh axes of the batch, key/value heads over `tensor`, and nothing
over `sequence`, since a token is one row. A number of rows that does not divide is not cut: then
all devices of the batch axes do the same work. `Generator.generate` fills its batches up so that
they divide, unless that would only make more of them.

Weights are gathered over `fsdp` once per compiled call (`gather_weights`), not once per token, so
while it generates every device holds them whole except for cuts over `tensor`.

Several processes may share a mesh. Each must make the same calls with the same prompts; what they
put on the mesh comes from the host, where all have the same, and `fetch` gives all of them
everything. Without a mesh all functions leave arrays where they are.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.nn.kv_cache import CacheShape, KVCache, constrain_cache, init_cache
from megatransformer_jax.sharding.rules import Sharder


def for_rows(model: MegaTransformer, num_rows: int) -> MegaTransformer:
    """The model as it passes that many rows: laid out for them, with any kernel that serves them.

    Args:
      model: on a mesh or not.
      num_rows: texts that are decoded at once.
    """
    sharder, attention = model.sharder, model.config.attention
    if sharder.mesh is not None:
        batch = sharder.rules.batch if num_rows % sharder.ways("batch") == 0 else None
        rules = dataclasses.replace(sharder.rules, batch=batch, length=None)
        sharder = dataclasses.replace(sharder, rules=rules)
    if attention.kernel != "xla":
        # A kernel named for training need not serve a prompt's shape.
        attention = dataclasses.replace(attention, kernel="auto")
    config = dataclasses.replace(model.config, attention=attention)
    return model.copy(config=config, sharder=sharder)


def constrain_rows(sharder: Sharder, tree: Any) -> Any:
    """Asks the compiler to cut every array's first axis as rows, and no other."""
    if sharder.mesh is None:
        return tree
    return jax.tree.map(lambda array: sharder.constrain(array, *_row_axes(array)), tree)


def put_rows(sharder: Sharder, tree: Any) -> Any:
    """Arrays of the host (or of this process alone) put onto the mesh, cut as rows."""
    if sharder.mesh is None:
        return tree
    return jax.tree.map(lambda array: _put(array, sharder, _row_axes(array)), tree)


def replicate(sharder: Sharder, tree: Any) -> Any:
    """Arrays of the host (or of this process alone) put onto every device of the mesh."""
    if sharder.mesh is None:
        return tree
    return jax.tree.map(lambda array: _put(array, sharder, ()), tree)


def fetch(sharder: Sharder, tree: Any) -> Any:
    """Whole NumPy arrays, in every process."""
    if sharder.mesh is not None:
        tree = _everywhere(tree, sharder)
    return jax.tree.map(np.asarray, jax.device_get(tree))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_cache(sharder: Sharder, config: ModelConfig, shape: CacheShape) -> KVCache:
    """`init_cache`, made in parts on the devices that hold them."""
    return constrain_cache(sharder, init_cache(config, shape))


@functools.partial(jax.jit, static_argnames="sharder")
def _everywhere(tree: Any, sharder: Sharder) -> Any:
    return jax.tree.map(lambda array: sharder.constrain(array, *(None,) * array.ndim), tree)


def _row_axes(array: Any) -> tuple[str | None, ...]:
    return ("batch", *(None,) * (array.ndim - 1))


def _put(array: Any, sharder: Sharder, axes: tuple[str | None, ...]) -> jax.Array:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(array), sharder, axes)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)
    sharding = sharder.sharding(*axes)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
