"""Rotary, sinusoidal and ALiBi positions against their definitions and properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import RotaryScalingConfig
from megatransformer_jax.ops.positions import (
    CONVENTIONS,
    alibi_slopes,
    apply_rotary,
    rotary_table,
    sinusoidal_embedding,
)

B, T, N, H, BASE = 2, 6, 3, 8, 50.0


def random_heads(seed, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (B, T, N, H), dtype)


def steps(start=0):
    return jnp.broadcast_to(jnp.arange(start, start + T, dtype=jnp.int32), (B, T))


def rotary_reference(x, positions, base, convention):
    """Complex multiplication, float64."""
    x = np.asarray(x, np.float64)
    frequency = base ** (-2.0 * np.arange(H // 2) / H)
    turn = np.exp(1j * np.asarray(positions)[..., None, None] * frequency)
    half = convention == "half"
    pairs = x[..., : H // 2] + 1j * x[..., H // 2 :] if half else x[..., ::2] + 1j * x[..., 1::2]
    turned = pairs * turn
    if half:
        return np.concatenate([turned.real, turned.imag], axis=-1)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def rotary(x, positions, base, convention):
    return apply_rotary(x, rotary_table(positions, H, base), convention)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_rotary_is_complex_multiplication(convention):
    x, positions = random_heads(0), jnp.asarray([[5, 0, 1, 2, 900, 7], [3, 2, 1, 0, 4, 4]])
    expected = rotary_reference(x, positions, BASE, convention)
    np.testing.assert_allclose(rotary(x, positions, BASE, convention), expected, atol=2e-4)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_rotary_products_depend_on_relative_position_only(convention):
    query, key = random_heads(1), random_heads(2)

    def products(start):
        turned = [rotary(x, steps(start), BASE, convention) for x in (query, key)]
        return jnp.einsum("BTNH,BSNH->BNTS", *turned)

    np.testing.assert_allclose(products(0), products(37), atol=5e-5)
    assert not np.allclose(products(0), jnp.einsum("BTNH,BSNH->BNTS", query, key), atol=0.1)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_rotary_keeps_lengths_and_leaves_position_zero(convention):
    x = random_heads(3)
    turned = rotary(x, steps(), BASE, convention)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_conventions_are_permutations_of_each_other():
    x = random_heads(4)
    order = np.arange(H).reshape(2, H // 2).T.ravel()  # half's channels, pair by pair
    half = rotary(x, steps(), BASE, "half")
    interleaved = rotary(x[..., order], steps(), BASE, "interleaved")
    np.testing.assert_allclose(interleaved, half[..., order], atol=1e-6)


def test_rotary_angles_are_float32_and_output_keeps_type():
    x = random_heads(5, jnp.bfloat16)
    # bfloat16 cannot tell 1000 from 1001; the angles must.
    turned = [rotary(x, steps(start), 1e4, "half") for start in (1000, 1001)]
    assert turned[0].dtype == jnp.bfloat16
    assert not np.array_equal(*turned)
    assert rotary_table(steps(), H, BASE).cos.dtype == jnp.float32
    table = rotary_table(steps(1000), H, 1e4)
    np.testing.assert_array_equal(apply_rotary(x, table, "half"), turned[0])


SCALINGS = [
    RotaryScalingConfig("linear", 3.0),
    RotaryScalingConfig("llama3", 4.0, 64),
    RotaryScalingConfig("llama3", 8.0, 512, low_freq_factor=2.0, high_freq_factor=16.0),
    RotaryScalingConfig("yarn", 4.0, 64),
    RotaryScalingConfig("yarn", 4.0, 32, truncate=False),
    RotaryScalingConfig("yarn", 2.0, 512, beta_fast=16.0, beta_slow=2.0, attention_factor=0.7),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.kind)
def test_stretched_rotations_are_those_of_transformers(scaling):
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    width, base = 32, 10_000.0
    theirs = {"rope_theta": base, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        theirs["original_max_position_embeddings"] = scaling.original_length
    names = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    theirs |= {name: getattr(scaling, name) for name in names.get(scaling.kind, ())}
    config = transformers.LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, rope_parameters=theirs
    )
    frequencies, factor = rope.ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu")
    positions = jnp.asarray([[0, 1, 5, 63, 200]])
    angle = np.asarray(positions)[..., None] * np.asarray(frequencies, np.float64)
    table = rotary_table(positions, width, base, scaling)
    np.testing.assert_allclose(table.cos, factor * np.cos(angle), atol=2e-5)
    np.testing.assert_allclose(table.sin, factor * np.sin(angle), atol=2e-5)
    plain = rotary_table(positions, width, base)
    assert np.max(np.abs(plain.sin - table.sin)) > 0.1


def test_sinusoidal_equals_numpy():
    positions, width = steps(3), 10
    expected = np.zeros((B, T, width))
    for i in range(width // 2):
        angle = np.asarray(positions) / 10_000 ** (2 * i / width)
        expected[..., 2 * i], expected[..., 2 * i + 1] = np.sin(angle), np.cos(angle)
    np.testing.assert_allclose(sinusoidal_embedding(positions, width), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (4, [2, 4, 6, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, [4, 8, 2]),
        (6, [2, 4, 6, 8, 1, 3]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_alibi_slopes_are_the_papers(num_heads, exponents):
    np.testing.assert_allclose(
        alibi_slopes(num_heads), [2.0**-exponent for exponent in exponents], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary_table(steps(), 7, BASE), "head width is 7"),
        (lambda: rotary(random_heads(0), steps(), BASE, "gptj"), "'gptj'; choose one of"),
        (lambda: sinusoidal_embedding(steps(), 5), "width is 5"),
        (lambda: alibi_slopes(0), "num_heads is 0"),
    ],
)
def test_bad_arguments_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
