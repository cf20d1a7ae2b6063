"""Means over batches weigh each by the rows that count."""

import jax.numpy as jnp
import pytest

from megatransformer_jax.evaluation.validation import MeanValidation, ScoreHook


def test_batches_weigh_as_many_rows_as_count() -> None:
    batches = [jnp.array(1.0), jnp.array(4.0)]
    validation = MeanValidation(batches, [3, 1], lambda params, batch: {"loss": params * batch})
    hook = ScoreHook(5, validation.score, lambda state: state + 1)
    assert hook(5, 1.0, {}) == {"validation/loss": pytest.approx(2 * (3 * 1 + 4) / 4)}
    with pytest.raises(ValueError, match="at least one counts"):
        MeanValidation(batches, [0, 0], lambda params, batch: {})
