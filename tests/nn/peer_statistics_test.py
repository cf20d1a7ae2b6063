"""Batch normalisation against torch, over several steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.nn.peer import RunningStatistics, normalize_by_batch, normalize_by_running

CHANNELS, EPS, MOMENTUM = 3, 1e-5, 0.9


def fresh():
    return RunningStatistics(jnp.zeros(CHANNELS), jnp.ones(CHANNELS), jnp.zeros(()))


def batch(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(seed, 1 + seed, (2, 4, CHANNELS)), jnp.float32)


@jax.jit
def differentiate(x, is_token, running, cotangent):
    def loss(x, running):
        out = normalize_by_batch(x, is_token, running, EPS)
        return jnp.sum(cotangent * out), out

    (of_x, reports), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, running)
    return out, of_x, reports


def move(running, reports):
    """The rule of training/trainable.py."""
    step = (1 - MOMENTUM) / reports.count
    return running.replace(
        mean=running.mean - step * reports.mean,
        variance=running.variance - step * reports.variance,
    )


def test_three_steps_equal_torch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm1d(CHANNELS, eps=EPS, momentum=1 - MOMENTUM, affine=False)
    running = fresh()
    cotangent = np.cos(np.arange(2 * 4 * CHANNELS, dtype=np.float32)).reshape(2, 4, CHANNELS)
    everything = jnp.ones((2, 4), bool)
    for seed in range(3):
        x = torch.tensor(np.asarray(batch(seed)), requires_grad=True)
        wanted = theirs(x.reshape(-1, CHANNELS)).reshape(x.shape)
        wanted.backward(torch.tensor(cotangent))
        out, of_x, reports = differentiate(batch(seed), everything, running, cotangent)
        running = move(running, reports)
        np.testing.assert_allclose(out, wanted.detach(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(of_x, x.grad, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(running.mean, theirs.running_mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(running.variance, theirs.running_var, rtol=1e-5, atol=1e-5)
    theirs.eval()
    x = batch(7)
    wanted = theirs(torch.tensor(np.asarray(x).reshape(-1, CHANNELS))).reshape(x.shape)
    np.testing.assert_allclose(normalize_by_running(x, running, EPS), wanted, rtol=1e-5, atol=1e-5)


def test_padding_counts_for_nothing():
    x = batch(1)
    is_token = np.array([[True, True, True, False], [True, True, False, False]])
    cotangent = np.ones_like(x)
    other = jnp.where(is_token[..., None], x, 99.0)
    out, _, reports = differentiate(x, is_token, fresh(), cotangent)
    changed, _, same_reports = differentiate(other, is_token, fresh(), cotangent)
    np.testing.assert_array_equal(out[is_token], changed[is_token])
    for ours, same in zip(jax.tree.leaves(reports), jax.tree.leaves(same_reports), strict=True):
        np.testing.assert_array_equal(ours, same)
    np.testing.assert_allclose(reports.mean, -x[is_token].mean(0), rtol=1e-5)
    np.testing.assert_allclose(reports.variance, 1 - x[is_token].var(0, ddof=1), rtol=1e-5)


def test_what_has_no_influence_and_single_tokens_report_nothing():
    x = batch(1)
    for is_token, cotangent in (
        (np.ones((2, 4), bool), np.zeros_like(x)),
        (np.arange(8).reshape(2, 4) == 0, np.ones_like(x)),
    ):
        out, _, reports = differentiate(x, is_token, fresh(), cotangent)
        assert np.all(np.isfinite(out))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(reports))
