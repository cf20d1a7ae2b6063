"""A step of any loss: micro-batches add up, non-finite steps are skipped, keys follow the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from megatransformer_jax.training.state import first_state
from megatransformer_jax.training.step import make_loss_step

RATE = 0.1


def loss(params, batch, key):
    """The mean of (w x - 1)^2 over rows; `noise` is what the key draws."""
    error = jnp.mean(jnp.square(params["w"] * batch["x"] - 1))
    return error, {"error": error, "noise": jax.random.uniform(key)}


def state():
    return first_state({"w": jnp.array([2.0])}, optax.sgd(RATE), jax.random.key(0))


def test_micro_batches_make_the_step_of_the_whole_batch() -> None:
    x = np.array([[0.5], [1.0], [-1.0], [2.0]], np.float32)
    gradient = np.mean(2 * (2 * x - 1) * x)
    results = {}
    for parts in (1, 2):
        step = jax.jit(make_loss_step(loss, optax.sgd(RATE), parts))
        after, metrics = step(state(), {"x": jnp.array(x)})
        np.testing.assert_allclose(after.params["w"], 2 - RATE * gradient, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"], np.mean((2 * x - 1) ** 2), rtol=1e-6)
        np.testing.assert_allclose(metrics["error"], metrics["loss"])
        np.testing.assert_allclose(metrics["grad_norm"], abs(gradient), rtol=1e-6)
        results[parts] = step, after, metrics

    step, after, metrics = results[1]
    assert step(after, {"x": jnp.array(x)})[1]["noise"] != metrics["noise"]
    same, again = step(state(), {"x": jnp.array(x)})
    assert again["noise"] == metrics["noise"]
    skipped, metrics = step(same, {"x": jnp.array(x) * jnp.nan})
    np.testing.assert_array_equal(skipped.params["w"], same.params["w"])
    assert metrics["skipped_steps"] == metrics["skipped_in_row"] == 1
    assert int(skipped.step) == 2
