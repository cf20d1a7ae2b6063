"""Counts read off a trace agree with XLA's and with hand counts."""

import jax
import jax.numpy as jnp
import pytest

from megatransformer_jax.models.cost.flops import product_flops

X, W = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
PRODUCT = 2 * 4 * 8 * 8


def test_products_and_convolutions_are_what_xla_counts():
    def function(x, w, images, kernel):
        convolved = jax.lax.conv_general_dilated(
            images,
            kernel,
            (2, 1),
            "VALID",
            feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x @ w, convolved

    images = jax.ShapeDtypeStruct((2, 9, 9, 4), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 2, 6), jnp.float32)
    # Outputs of 2 images: 4 x 7 places, 6 channels, each of 3 x 3 places of 2 channels.
    by_hand = PRODUCT + 2 * (2 * 4 * 7 * 6) * (9 * 2)
    arguments = X, W, images, kernel
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert product_flops(function, *arguments) == by_hand == analysis["flops"]


def test_loops_count_as_often_as_they_run_and_alternatives_once():
    loop = lambda x, w: jax.lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ w), x)  # noqa: E731
    assert product_flops(loop, X, W) == 5 * PRODUCT
    nested = lambda x, w: jax.jit(jax.checkpoint(loop))(x, w) @ w  # noqa: E731
    assert product_flops(nested, X, W) == 6 * PRODUCT

    def choose(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert product_flops(choose, X, W) == 2 * PRODUCT
    assert product_flops(jnp.tanh, X) == 0


def test_a_loop_of_unknown_length_is_an_error():
    def until(x, w):
        return jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y @ w, x)

    with pytest.raises(ValueError, match="number of iterations is data"):
        product_flops(until, X, W)
