"""Patches are the image's squares, in order, and go back."""

import jax
import numpy as np
import pytest

from megatransformer_jax.nn.embedding import patchify, unpatchify


def test_patches_are_squares_and_go_back():
    images = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4], images[1, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 2, (4, 6, 3)), images)


def test_patches_that_do_not_fill_the_image_are_an_error():
    with pytest.raises(ValueError, match="4x6 is not filled by patches of 4x4"):
        patchify(jax.numpy.zeros((1, 4, 6, 1)), 4)
