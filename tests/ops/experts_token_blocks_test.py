"""Blocks of tokens are a permutation of them, with padding behind."""

import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.ops.experts import join_tokens, map_tokens, num_blocks, split_tokens


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_joining_undoes_splitting(blocks):
    array = jnp.arange(1, 2 * 7 * 2 + 1).reshape(2, 7, 2)
    parts = split_tokens(array, blocks)
    assert parts.shape[:2] == (blocks, 2)
    assert jnp.count_nonzero(parts) == array.size
    np.testing.assert_array_equal(join_tokens(parts, 7), array)
    np.testing.assert_array_equal(parts[-1, :, 0], array[:, blocks - 1])
    doubled = map_tokens(lambda x, y: {"sum": x + y}, blocks, array, array)["sum"]
    np.testing.assert_array_equal(doubled, 2 * array)


def test_blocks_hold_what_is_allowed():
    # Two rows of 10 tokens with 3 elements each, 12 elements per block: two columns.
    assert num_blocks(2, 10, 3, 12) == 5
    assert num_blocks(2, 10, 3, 60) == 1
    assert num_blocks(2, 10, 100, 1) == 10
