"""Convolution of clips equals a loop over frames; downsampling gives ceil(l / 2) and no leak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.nn.conv import ConvDownsampling, MaskedConvolution, frame_mask
from megatransformer_jax.types import DTypePolicy

F, C = 9, 3


@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (1, 2)])
def test_convolution_is_a_sum_over_frames_of_the_clip(stride, dilation):
    module = MaskedConvolution(4, DTypePolicy(), stride=stride, dilation=dilation)
    x = jax.random.normal(jax.random.key(0), (2, F, C))
    lengths = [F, 5]
    is_frame = frame_mask(jnp.asarray(lengths), F)
    variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(1), x, is_frame))
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    output = jax.jit(module.apply)(variables, x, is_frame)
    assert output.shape == (2, -(-F // stride), 4)
    for n, length in enumerate(lengths):
        for j in range(-(-length // stride)):
            total = np.zeros(4)
            for tap in range(3):
                frame = j * stride + (tap - 1) * dilation
                if 0 <= frame < length:
                    total += np.asarray(x[n, frame], np.float64) @ kernel[tap]
            np.testing.assert_allclose(output[n, j], total, atol=1e-5)


@pytest.mark.parametrize(("num_halvings", "length"), [(0, 4), (2, 6)])
def test_downsampling_halves_lengths_and_padding_does_not_leak(num_halvings, length):
    module = ConvDownsampling(4, num_halvings, DTypePolicy())
    x = jax.random.normal(jax.random.key(0), (1, F, C))
    variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(1), x, jnp.asarray([F])))
    apply = jax.jit(module.apply)
    output, shorter = apply(variables, x, jnp.asarray([length]))
    places = -(-length // 2**num_halvings)
    assert shorter.tolist() == [places]
    alone, _ = apply(variables, x[:, :length], jnp.asarray([length]))
    assert alone.shape[1] == places
    np.testing.assert_allclose(output[:, :places], alone, atol=1e-6)
    _, whole = apply(variables, x, jnp.asarray([F]))
    assert whole.tolist() == [-(-F // 2**num_halvings)]
