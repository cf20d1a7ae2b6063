"""Product keys against a search through all keys."""

import jax.numpy as jnp
import numpy as np

from megatransformer_jax.ops.experts import retrieve


def test_finds_the_best_of_all_keys():
    rng = np.random.default_rng(0)
    num_keys, half, top_k = 7, 3, 4
    half_keys = rng.normal(size=(2, num_keys, half)).astype(np.float32)
    queries = rng.normal(size=(2, 5, 3, 2, half)).astype(np.float32)
    scores, chosen = retrieve(jnp.asarray(queries), jnp.asarray(half_keys), top_k)
    assert scores.shape == chosen.shape == (2, 5, 3, top_k)

    keys = np.stack(
        [
            np.concatenate([half_keys[0, i], half_keys[1, j]])
            for i in range(num_keys)
            for j in range(num_keys)
        ]
    )
    products = queries.reshape(2, 5, 3, 2 * half) @ keys.T
    wanted = np.argsort(-products, axis=-1)[..., :top_k]
    np.testing.assert_array_equal(chosen, wanted)
    np.testing.assert_allclose(scores, np.take_along_axis(products, wanted, -1), rtol=1e-5)
