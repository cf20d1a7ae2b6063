"""How far two sets of parameters are apart, against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import PLAIN, TINY, make

from megatransformer_jax.evaluation.divergence import divergence_report, measure_divergence
from megatransformer_jax.types import Batch

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def batch():
    """The second row ends in padding, which counts nowhere."""
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 7)).astype(np.int32)
    segments = np.ones((2, 6), np.int32)
    segments[1, 4:] = 0
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
    arrays = tokens[:, :-1], tokens[:, 1:], segments.astype(np.float32), segments, positions
    return Batch(*map(jnp.asarray, arrays))


def changed(params):
    return jax.tree.map(lambda leaf: leaf * 1.02 + 0.003, params)


def outputs(model, params, batch, depth):
    output = model.apply(
        {"params": params}, batch.tokens, segment_ids=batch.segment_ids, num_steps=depth
    )
    log_probs = jax.nn.log_softmax(output.logits)
    return np.asarray(log_probs, np.float64), np.asarray(output.latent, np.float64)


def test_divergence_is_that_of_the_definitions(batch):
    model, params = make()
    other = changed(params)
    rows = measure_divergence(model, params, other, [batch, batch], (1, 3), KEY)
    counts = np.asarray(batch.loss_mask) > 0
    for row in rows:
        (before, latent), (now, ours) = (
            outputs(model, each, batch, row.depth) for each in (params, other)
        )
        kl = np.sum(np.exp(before) * (before - now), axis=-1)[counts].mean()
        error = np.linalg.norm(ours - latent, axis=-1) / np.linalg.norm(latent, axis=-1)
        targets = np.asarray(batch.targets)[..., None]
        loss = -np.take_along_axis(now, targets, axis=-1)[..., 0][counts].mean()
        assert row.kl == pytest.approx(kl, rel=1e-3)
        assert row.latent_error == pytest.approx(error[counts].mean(), rel=1e-4)
        assert row.loss == pytest.approx(loss, rel=1e-5)
        assert row.tokens == 2 * counts.sum()
    assert rows[0].exit_depth == 1
    assert 1 < rows[1].exit_depth <= 3


def test_the_same_parameters_are_not_apart(batch):
    model, params = make()
    (row,) = measure_divergence(model, params, params, [batch], (2,), KEY)
    assert (row.kl, row.latent_error) == (0, 0)
    assert row.loss == row.reference_loss
    assert row.exit_depth == row.reference_exit_depth


def test_a_model_without_a_core_has_one_row(batch):
    model, params = make(PLAIN)
    rows = measure_divergence(model, params, changed(params), [batch], (None,), KEY)
    assert rows[0].exit_depth is None
    assert rows[0].kl > 0
    report = divergence_report(rows, None, of_problems=True, title="a title")
    assert "exact answers" in str(report)
    assert "exit depth" not in str(report)
    assert report.rows == [dataclasses.asdict(rows[0])]
