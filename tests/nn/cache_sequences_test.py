"""Rows of single sequences as a TPU writes them, against those of a CPU, on a mesh and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny

from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.nn.cache_sequences import NewRows, write_tokens
from megatransformer_jax.nn.kv_cache import CacheShape, constrain_cache, init_cache
from megatransformer_jax.ops.cached_attention import apart, side_by_side
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder

B, HEAD_WIDTH = 4, 4
CONFIG = tiny()


STARTS = ([0, 15, 16, 199], [1, 16, 40, 7])
IS_WRITTEN = ([True, True, False, True], [True, False, False, True])


def pairs_of(array, rng):
    """New tokens' pairs, sequences first, as wide as those of the array."""
    shape = (2, B, len(array), array.shape[2], 1, HEAD_WIDTH)
    return side_by_side(*jnp.asarray(rng.normal(size=shape), jnp.float32), array.shape[-1])


def written(platform, sharder):
    """Core's pairs apart [2, E, B, K, S, H] and steps after two writes."""
    rng = np.random.default_rng(0)
    cache = init_cache(CONFIG, CacheShape(B, 200, 2, jnp.dtype(jnp.float32), platform))

    @jax.jit
    def write(cache, rows, is_written):
        cache = constrain_cache(sharder, cache)
        return write_tokens(cache, rows, jnp.arange(B) + 1, is_written, sharder)

    for starts, is_written in zip(STARTS, IS_WRITTEN, strict=True):
        prelude, core, coda = (
            pairs_of(array, rng) for array in (cache.prelude, cache.core, cache.coda)
        )
        rows = NewRows((prelude, coda), core, jnp.full(B, 2))
        cache = write(cache.replace(next_position=jnp.asarray(starts)), rows, jnp.array(is_written))
    core = np.stack(apart(cache.core, HEAD_WIDTH))[..., :200, :]
    return core, cache.num_steps[:, :200]


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, tensor=4)], ids=["alone", "mesh"])
def test_tokens_stand_at_the_same_rows(mesh):
    sharder = Sharder() if mesh is None else Sharder(make_mesh(mesh, jax.devices()))
    wanted = written("cpu", sharder)
    for got, other in zip(written("tpu", sharder), wanted, strict=True):
        np.testing.assert_array_equal(got, other)
    is_used = np.any(wanted[0] != 0, axis=(0, 1, 3, 5))
    assert [row.nonzero()[0].tolist() for row in is_used] == [[0, 1], [15], [], [7, 199]]
