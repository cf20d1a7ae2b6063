"""Tasks of a batch's rows, by weight."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from megatransformer_jax.config.media_data import MediaDataConfig
from megatransformer_jax.data.media.rows import batch_tasks

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


@hypothesis.given(WEIGHTS, st.integers(1, 40), st.integers(0, 1000))
def test_each_task_has_its_share_rounded_up_or_down(weights, batch_size, seed):
    tasks = batch_tasks(np.array(weights), batch_size, np.random.default_rng(seed))
    assert len(tasks) == batch_size
    shares = batch_size * np.array(weights) / np.sum(weights)
    counts = np.bincount(tasks, minlength=len(weights))
    assert np.all(np.abs(counts - shares) < 1 + 1e-6)


@hypothesis.given(WEIGHTS, st.integers(1, 40), st.integers(0, 20))
def test_no_batch_has_more_than_the_config_says(weights, batch_size, seed):
    names = ("draw", "caption", "speak", "transcribe", "text")[: len(weights)]
    config = MediaDataConfig(
        tasks=tuple(f"{name}={weight!r}" for name, weight in zip(names, weights, strict=True))
    )
    tasks = batch_tasks(np.array(weights), batch_size, np.random.default_rng(seed))
    for task, name in enumerate(names):
        assert np.sum(tasks == task) <= config.most_rows(name, batch_size)
    assert config.most_rows("none", batch_size) == 0


def test_shares_that_are_no_whole_rows_are_right_on_average():
    weights, rng = np.array([1.0, 2.0]), np.random.default_rng(0)
    counts = [np.sum(batch_tasks(weights, 4, rng) == 0) for _ in range(3000)]
    assert set(counts) == {1, 2}
    assert abs(np.mean(counts) - 4 / 3) < 0.03


def test_rows_are_in_no_order():
    rng = np.random.default_rng(0)
    firsts = {batch_tasks(np.array([1.0, 1.0]), 4, rng)[0] for _ in range(50)}
    assert firsts == {0, 1}
