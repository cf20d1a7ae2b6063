"""Histories and scores that the tests of processors share."""

import jax.numpy as jnp
import numpy as np

from megatransformer_jax.generation.history import History

NUM_ROWS = 6
CAPACITY = 24
VOCAB_SIZE = 23


def random_history(rng: np.random.Generator, num_kinds: int = VOCAB_SIZE) -> History:
    """Rows of unequal length; what stands behind their ends is junk."""
    tokens = rng.integers(0, num_kinds, (NUM_ROWS, CAPACITY))
    lengths = rng.integers(4, CAPACITY, NUM_ROWS)
    prompt_lengths = np.array([rng.integers(1, length + 1) for length in lengths])
    return History(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
    )


def random_logits(rng: np.random.Generator, kind: str) -> jnp.ndarray:
    """[NUM_ROWS, VOCAB_SIZE] scores.

    'plain', 'ties' (many equal ones), 'masked' (some banned), 'single' (all but one banned),
    'flat' (all equal).
    """
    logits = rng.normal(0, 3, (NUM_ROWS, VOCAB_SIZE)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits / 2) * 2
    elif kind == "masked":
        logits[rng.random(logits.shape) < 0.5] = -np.inf
        logits[:, 5] = 1.0
    elif kind == "single":
        survivor = rng.integers(0, VOCAB_SIZE, NUM_ROWS)
        keep = np.arange(VOCAB_SIZE) == survivor[:, None]
        logits = np.where(keep, logits, -np.inf).astype(np.float32)
    elif kind == "flat":
        logits[:] = 0.25
    elif kind != "plain":
        raise ValueError(kind)
    return jnp.asarray(logits)


KINDS = ("plain", "ties", "masked", "single", "flat")


def row_tokens(history: History, row: int) -> list[int]:
    return np.asarray(history.tokens)[row, : int(history.lengths[row])].tolist()


def generated_tokens(history: History, row: int) -> list[int]:
    return row_tokens(history, row)[int(history.prompt_lengths[row]) :]
