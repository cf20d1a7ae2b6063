"""Moving only what differs gives the same cache as moving everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import PLAIN, tiny

from megatransformer_jax.nn.cache_rows import reorder_new_rows
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache, take_sequences

NUM_SEQUENCES, CAPACITY = 6, 256
reorder = jax.jit(reorder_new_rows)


def random_cache(config, first_row, length):
    """Sequences 0-2 are the same before `first_row`, and so are 3-5."""
    rng = np.random.default_rng(0)
    cache = init_cache(
        config,
        CacheShape(
            NUM_SEQUENCES, CAPACITY, num_slots=2, dtype=jnp.dtype(jnp.float32), platform="cpu"
        ),
    )

    def fill(array, axis, rows_axis):
        values = rng.integers(0, 1000, array.shape)
        prompts = np.repeat(np.take(values, [0, 3], axis), 3, axis)
        rows = np.arange(array.shape[rows_axis])
        is_shared = (rows < first_row).reshape(-1, *[1] * (array.ndim - 1 - rows_axis))
        return jnp.asarray(np.where(is_shared, prompts, values), array.dtype)

    entries = functools.partial(jax.tree.map, lambda array: fill(array, 1, 3))
    return cache.replace(
        prelude=entries(cache.prelude),
        core=entries(cache.core),
        coda=entries(cache.coda),
        positions=fill(cache.positions, 0, 1),
        num_steps=fill(cache.num_steps, 0, 1),
        next_position=jnp.arange(NUM_SEQUENCES),
        length=jnp.int32(length),
    )


@pytest.mark.parametrize("config", [tiny(coda_layers=0), PLAIN], ids=["recurrent", "plain"])
@pytest.mark.parametrize(
    ("first_row", "length"), [(10, 11), (63, 65), (64, 128), (70, 200), (130, 256), (100, 100)]
)
def test_it_equals_taking_whole_sequences(config, first_row, length):
    cache = random_cache(config, first_row, length)
    for sequences in ([0, 1, 2, 3, 4, 5], [2, 0, 0, 3, 5, 4], [1, 1, 1, 5, 5, 5]):
        sequences = jnp.asarray(sequences, jnp.int32)
        got = reorder(cache, sequences, jnp.int32(first_row))
        wanted = take_sequences(cache, sequences)
        # Rows that no sequence uses may be anything.
        jax.tree.map(np.testing.assert_array_equal, used(got, length), used(wanted, length))


def used(cache, length):
    arrays = [*jax.tree.leaves((cache.prelude, cache.core, cache.coda))]
    rows = [array[..., :length, :] for array in arrays]
    return rows, cache.positions[:, :length], cache.num_steps[:, :length], cache.next_position
