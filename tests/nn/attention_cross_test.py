"""Cross-attention against NumPy; a condition of nothing gives exact zeros."""

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.nn.attention import CrossAttention
from megatransformer_jax.types import DTypePolicy

HEADS, HEAD_WIDTH = 2, 3


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_equals_numpy_and_reads_nothing_from_nothing():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    width = HEADS * HEAD_WIDTH
    x, context = draw(3, 4, width), draw(3, 5, 7)
    is_context = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    params = {
        "query_kernel": draw(width, width),
        "context_kernel": draw(7, 2 * width),
        "output_kernel": draw(width, width),
    }
    module = CrossAttention(HEAD_WIDTH, DTypePolicy())
    arrays = tuple(map(jnp.asarray, (x, context, is_context)))
    output = jax.jit(module.apply)({"params": params}, *arrays)
    wanted = np.zeros_like(x)
    for n, row in np.ndindex(2, 4):
        said = context[n][is_context[n]]
        keys, values = np.split(said @ params["context_kernel"], 2, axis=-1)
        query = x[n, row] @ params["query_kernel"]
        mixed = []
        for head in range(HEADS):
            part = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
            weights = softmax(keys[:, part] @ query[part] / np.sqrt(HEAD_WIDTH))
            mixed.append(weights @ values[:, part])
        wanted[n, row] = np.concatenate(mixed) @ params["output_kernel"]
    np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(output[2], 0)

    def total(context, params):
        return jnp.sum(module.apply({"params": params}, arrays[0], context, arrays[2]))

    gradient = np.asarray(jax.jit(jax.grad(total))(arrays[1], params))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), is_context)
