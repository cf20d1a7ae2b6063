"""Quantised matrices: storage, products against float ones, and no float copy in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.nn.quantized import (
    LARGEST,
    QuantizedMatrix,
    block_inputs,
    einsum,
    matrix_sides,
    multiply,
    pack,
    take_rows,
    unpack,
)


def draw(shape, bits, group=None, *, num_inputs=1, rounds_inputs=False, input_scale=None, seed=0):
    """A matrix of random numbers and scales, and what it stands for as [K, N], in NumPy."""
    rng = np.random.default_rng(seed)
    inputs, outputs = matrix_sides(shape, num_inputs)
    group = group or inputs + inputs % 2
    numbers = rng.integers(-LARGEST[bits], LARGEST[bits] + 1, (inputs, outputs)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, (-(-inputs // group), outputs)).astype(np.float32)
    matrix = QuantizedMatrix(
        pack(jnp.asarray(numbers), bits),
        jnp.asarray(scale),
        None if input_scale is None else jnp.asarray(input_scale),
        shape,
        num_inputs,
        bits,
        group,
        rounds_inputs,
    )
    meant = numbers * np.repeat(scale, group, axis=0)[:inputs]
    return matrix, meant if input_scale is None else meant * input_scale[:, None]


def rounded(x):
    """Each row to 8 bits by its largest entry."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    scale = np.where(largest == 0, 1, largest / np.float32(127)).astype(np.float32)
    return np.round(x / scale).astype(np.int8) * scale


# Several blocks; a last group that is shorter; an odd number of inputs; more groups than fit a
# block; fewer inputs than a block.
SIZES = ((352, None), (352, 64), (33, None), (1000, 256), (10, 4))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rounds_inputs", [False, True])
@pytest.mark.parametrize(("inputs", "group"), SIZES)
def test_products_are_those_of_the_matrix_that_is_meant(inputs, group, rounds_inputs, bits):
    matrix, meant = draw((inputs, 6), bits, group, rounds_inputs=rounds_inputs)
    np.testing.assert_allclose(matrix.dequantize(), meant, rtol=1e-6)
    x = np.random.default_rng(1).normal(size=(3, inputs)).astype(np.float32)
    x[1] = 0
    for rows in (x, x[:1]):
        expected = (rounded(rows) if rounds_inputs else rows) @ meant
        found = jax.jit(multiply)(jnp.asarray(rows), matrix)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_numbers_of_four_bits_share_bytes():
    numbers = np.arange(-7, 8, dtype=np.int8)[:, None] * np.array([[1, -1]], np.int8)
    packed = pack(jnp.asarray(numbers), 4)
    assert packed.shape == (8, 2)
    np.testing.assert_array_equal(unpack(packed, 4, 15), numbers)
    matrix, _ = draw((128, 32), 4, 64)
    assert matrix.nbytes == 128 * 32 // 2 + 2 * 32 * 4
    assert matrix.nbytes <= 0.15 * 4 * matrix.size
    assert draw((128, 32), 8)[0].nbytes <= 0.26 * 4 * matrix.size


def test_fused_axes_and_a_scale_of_the_inputs():
    """As attention has them: [D, K, G, H] for the projections, [N, H, D] for the output."""
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.5, 2, 16).astype(np.float32)
    x = rng.normal(size=(2, 3, 16)).astype(np.float32)
    fused, meant = draw((16, 2, 3, 4), 8, 8, input_scale=scale)
    found = einsum("btd,dkgh->btkgh", jnp.asarray(x), fused)
    np.testing.assert_allclose(found, (x @ meant).reshape(2, 3, 2, 3, 4), rtol=1e-5, atol=1e-5)
    merged, meant = draw((4, 4, 5), 8, num_inputs=2)
    found = multiply(jnp.asarray(x), merged.reshape(-1, 5))
    np.testing.assert_allclose(found, x @ meant, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(4, 4, 5\) has no shape \(5, 16\)"):
        merged.reshape(5, 16)
    with pytest.raises(ValueError, match="15 inputs for a matrix of 16"):
        multiply(jnp.zeros((2, 15)), merged)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_table_gives_its_rows_and_scores_them(bits):
    table, meant = draw((7, 16), bits, 8, num_inputs=0)
    rows = jnp.array([[6, 0], [2, 2]])
    np.testing.assert_allclose(take_rows(table, rows), meant.T[np.asarray(rows)], rtol=1e-6)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 2, 16)), jnp.bfloat16)
    table = table.astype(jnp.bfloat16)
    logits = einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
    assert logits.dtype == jnp.float32
    assert einsum("btd,vd->btv", x, table).dtype == jnp.bfloat16
    np.testing.assert_allclose(logits[0], np.float32(x[0]) @ meant, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_a_loop_holds_no_float_copy(bits, rounds_inputs):
    """A conversion of whole matrices would be moved in front of the loop, and need 4 bytes each."""
    matrices = [draw((256, 256), bits, 64, rounds_inputs=rounds_inputs, seed=i)[0] for i in (1, 2)]

    def iterate(matrices, x, count):
        def body(_, x):
            for matrix in matrices:
                x = jnp.tanh(multiply(x, matrix))
            return x

        return jax.lax.fori_loop(0, count, body, x)

    compiled = jax.jit(iterate).lower(matrices, jnp.ones((8, 256)), 4).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * 256 * 256


def test_blocks_hold_whole_groups_or_parts_of_one():
    for inputs in (10, 33, 64, 128, 352, 1000, 1024, 5632):
        for group in (inputs + inputs % 2, 2, 32, 64, 96, 256, 1024):
            block = block_inputs(inputs, group)
            assert block % group == 0 or group % block == 0
            assert block % 2 == 0
            assert inputs % block <= group
