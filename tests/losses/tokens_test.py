"""Token loss against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.losses.tokens import token_loss


def example():
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(2, 5, 7))
    targets = rng.integers(0, 7, (2, 5))
    mask = np.array([[1, 1, 0, 1, 1], [0, 0, 1, 1, 0]], np.float64)
    return logits, targets, mask


def compute(logits, targets, mask):
    return token_loss(
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(mask, jnp.float32),
    )


def test_equals_numpy():
    logits, targets, mask = example()
    log_normalizer = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    loss = compute(logits, targets, mask)
    np.testing.assert_allclose(
        loss.cross_entropy, ((log_normalizer - chosen) * mask).sum(), rtol=1e-6
    )
    np.testing.assert_allclose(
        loss.squared_log_normalizer, (log_normalizer**2 * mask).sum(), rtol=1e-6
    )
    assert loss.correct == ((logits.argmax(-1) == targets) * mask).sum()
    assert loss.tokens == 6


def test_masked_positions_have_no_influence():
    logits, targets, mask = example()
    other = np.where(mask[..., None] == 0, 100.0, logits)
    assert compute(other, targets, mask) == compute(logits, targets, mask)
    gradient = jax.grad(
        lambda x: (
            token_loss(
                x, jnp.asarray(targets, jnp.int32), jnp.asarray(mask, jnp.float32)
            ).cross_entropy
        )
    )(jnp.asarray(logits, jnp.float32))
    assert not np.any(gradient[mask == 0])


def test_huge_logits_stay_finite():
    logits, targets, mask = example()
    assert np.isfinite(compute(1e4 * logits, targets, mask).cross_entropy)
