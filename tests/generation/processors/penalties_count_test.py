"""Presence and frequency penalties against the formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_rows import (
    KINDS,
    NUM_ROWS,
    VOCAB_SIZE,
    generated_tokens,
    random_history,
    random_logits,
)

from megatransformer_jax.generation.processors.penalties import CountPenalty


@jax.jit
def process(processor, history, logits):
    return processor(processor.init(history), history, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_penalties_of_each_row(kind: str):
    rng = np.random.default_rng(KINDS.index(kind))
    presence = rng.uniform(-2, 2, NUM_ROWS).astype(np.float32)
    frequency = rng.uniform(-2, 2, NUM_ROWS).astype(np.float32)
    presence[0], frequency[1] = 0, 0
    processor = CountPenalty(jnp.asarray(presence), jnp.asarray(frequency), VOCAB_SIZE)
    for _ in range(5):
        history, logits = random_history(rng, num_kinds=6), random_logits(rng, kind)
        expected = np.array(logits)
        for row in range(NUM_ROWS):
            counts = np.bincount(generated_tokens(history, row), minlength=VOCAB_SIZE)
            expected[row] -= presence[row] * (counts > 0) + frequency[row] * counts
        ours = process(processor, history, logits)
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_the_prompt_does_not_count():
    history = random_history(np.random.default_rng(0))
    history = history.replace(prompt_lengths=history.lengths)
    processor = CountPenalty(jnp.float32(1), jnp.float32(1), VOCAB_SIZE)
    logits = jnp.zeros((NUM_ROWS, VOCAB_SIZE))
    np.testing.assert_array_equal(process(processor, history, logits), logits)
