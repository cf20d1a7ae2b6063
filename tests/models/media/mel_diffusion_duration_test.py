"""Lengths: where the head starts, its loss, and rounding."""

import jax
import jax.numpy as jnp
import numpy as np
from decoder_contract import random_condition
from flax import linen as nn

from megatransformer_jax.models.media.mel_diffusion import (
    DurationHead,
    duration_error,
    whole_frames,
)
from megatransformer_jax.types import DTypePolicy


def test_the_head_starts_at_half_of_the_longest_clip():
    head, condition = DurationHead(64, DTypePolicy()), random_condition(2, 4)
    log_frames, _ = jax.jit(head.init_with_output)(jax.random.key(0), condition)
    np.testing.assert_allclose(log_frames, np.log(32), rtol=1e-6)


def test_a_head_learns_lengths_from_conditions():
    head, condition = DurationHead(64, DTypePolicy()), random_condition(4, 8)
    lengths = jnp.asarray([3, 20, 40, 7])
    params = nn.meta.unbox(jax.jit(head.init)(jax.random.key(0), condition))["params"]

    def loss(params):
        return jnp.mean(duration_error(head.apply({"params": params}, condition), lengths))

    descend = jax.jit(
        lambda params: jax.lax.fori_loop(
            0,
            200,
            lambda _, p: jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(loss)(p)),
            params,
        )
    )
    learned = jax.jit(head.apply)({"params": descend(params)}, condition)
    np.testing.assert_array_equal(whole_frames(learned, 64), lengths)


def test_errors_and_rounding():
    error = duration_error(jnp.log(jnp.asarray([2.0, 8.0, 5.0])), jnp.asarray([4, 8, 0]))
    np.testing.assert_allclose(error, [np.log(2) ** 2, 0, 0], atol=1e-6)
    frames = whole_frames(jnp.asarray([-5.0, np.log(2.6), np.log(7.2), 900.0]), 7)
    np.testing.assert_array_equal(frames, [1, 3, 7, 7])
