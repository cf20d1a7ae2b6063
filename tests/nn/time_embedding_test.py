"""The embedding of the time against its formula; what a condition adds to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.nn.time_embedding import ConditionEmbedding, sinusoidal_time
from megatransformer_jax.types import DTypePolicy


def test_sinusoids_equal_their_formula():
    times = np.array([0.0, 0.001, 0.25, 1.0])
    for row, time in zip(np.asarray(sinusoidal_time(jnp.asarray(times), 6)), times, strict=True):
        angles = [1000 * time / 10_000 ** (2 * i / 6) for i in range(3)]
        np.testing.assert_allclose(row, [*np.cos(angles), *np.sin(angles)], atol=1e-4)
    with pytest.raises(ValueError, match="width is 5"):
        sinusoidal_time(jnp.ones(1), 5)


def test_the_last_vector_that_there_is_counts_and_nothing_is_learned():
    module = ConditionEmbedding(4, DTypePolicy())
    context = jax.random.normal(jax.random.key(0), (4, 3, 5))
    is_context = jnp.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]], bool)
    time = jnp.full(4, 0.3)
    variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(1), time, context, is_context))
    variables["params"]["null_embedding"] = jnp.full(4, 100.0)
    apply = jax.jit(lambda time, context: module.apply(variables, time, context, is_context))
    embedding, read = apply(time, context)
    np.testing.assert_array_equal(read == 0, np.broadcast_to(~is_context[..., None], read.shape))
    np.testing.assert_allclose(
        np.mean(np.square(read), -1), np.where(is_context, 1.0, 0.0), rtol=1e-4
    )
    np.testing.assert_array_equal(embedding[2], embedding[3])
    assert np.all(np.abs(embedding[2]) > 50)
    assert np.all(np.abs(embedding[:2]) < 50)

    def moved(row, place):
        changed = apply(time, context.at[row, place].add(1.0))[0]
        return [int(i) for i in np.flatnonzero(np.any(changed != embedding, axis=1))]

    assert [moved(0, place) for place in range(3)] == [[], [0], []]
    assert [moved(1, place) for place in range(3)] == [[], [], [1]]
    assert [moved(2, place) for place in range(3)] == [[], [], []]
    later = apply(time + 0.1, context)[0]
    assert np.all(np.any(np.abs(later - embedding) > 1e-3, axis=1))
