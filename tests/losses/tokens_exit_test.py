"""The distribution of exits and its loss, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.losses.tokens import (
    exit_log_probs,
    exit_loss,
    geometric_log_prior,
    uniform_log_prior,
)

STEPS, ROWS, LENGTH = 5, 2, 3


def example():
    rng = np.random.default_rng(0)
    gate_logits = 2 * rng.normal(size=(STEPS, ROWS, LENGTH))
    losses = rng.uniform(0.1, 4, size=gate_logits.shape)
    mask = np.array([[1, 0, 1], [1, 1, 0]], np.float64)
    return gate_logits, losses, mask


def numpy_probs(gate_logits):
    stop = 1 / (1 + np.exp(-gate_logits))
    there = np.concatenate([np.ones_like(stop[:1]), np.cumprod(1 - stop, axis=0)])
    return np.concatenate([stop[:-1] * there[:-2], there[-2:-1]])


def float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def test_probabilities_and_loss_equal_numpy():
    gate_logits, losses, mask = example()
    probs = numpy_probs(gate_logits)
    np.testing.assert_allclose(probs.sum(0), 1)
    log_probs = exit_log_probs(*float32(gate_logits))
    np.testing.assert_allclose(np.exp(log_probs), probs, rtol=1e-5, atol=1e-7)
    for mean in (None, 2.5):
        if mean is None:
            prior, ours = np.full(STEPS, 1 / STEPS), uniform_log_prior(STEPS)
        else:
            prior = (1 / mean) * (1 - 1 / mean) ** np.arange(STEPS)
            prior[-1] = 1 - prior[:-1].sum()
            ours = geometric_log_prior(STEPS, mean)
        np.testing.assert_allclose(np.exp(ours), prior, rtol=1e-5)
        found = exit_loss(log_probs, *float32(losses, mask), ours)
        entropy = (-(probs * np.log(probs)).sum(0) * mask).sum()
        divergence = ((probs * np.log(probs / prior[:, None, None])).sum(0) * mask).sum()
        steps = ((probs * np.arange(1, STEPS + 1)[:, None, None]).sum(0) * mask).sum()
        wanted = (((probs * losses).sum(0) * mask).sum(), divergence, entropy, steps)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # The uniform prior's KL is minus the entropy but for a constant.
    uniform = exit_loss(log_probs, *float32(losses, mask), uniform_log_prior(STEPS))
    np.testing.assert_allclose(
        uniform.divergence, mask.sum() * np.log(STEPS) - uniform.entropy, rtol=1e-5
    )


def test_the_last_gate_says_nothing_and_sure_gates_are_finite():
    gate_logits, losses, mask = float32(*example())
    other = gate_logits.at[-1].add(3.0)
    np.testing.assert_array_equal(exit_log_probs(gate_logits), exit_log_probs(other))

    def loss(gate_logits):
        found = exit_loss(exit_log_probs(gate_logits), losses, mask, uniform_log_prior(STEPS))
        return found.expected_loss - found.entropy

    for sure in (-500.0, 500.0):
        value, gradient = jax.value_and_grad(loss)(jnp.full_like(gate_logits, sure))
        assert np.isfinite(value) and np.isfinite(gradient).all()
