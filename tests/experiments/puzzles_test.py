"""The experiment on puzzles trains, is scored by votes and can be watched."""

import numpy as np
import pytest

import megatransformer_jax as mt
from megatransformer_jax.config.build import configure
from megatransformer_jax.runs.train import train

SHORT = {
    "train": {"steps": 4},
    "optimizer": {"warmup_steps": 0},
    "checkpoint": {"every_steps": 4},
    "evaluation": {"every_steps": 4, "num_batches": 1, "final_depths": (1, 2)},
    "samples": {"every_steps": 4},
    "logging": {"every_steps": 2},
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> mt.Model:
    folder = tmp_path_factory.mktemp("run") / "puzzles"
    train(configure("puzzles:tiny", SHORT | {"workdir": str(folder)}))
    return mt.load(folder)


def test_votes_are_scored_at_every_depth(lm: mt.Model) -> None:
    alone = mt.evaluate(lm, depths=(1, 4), num_batches=1)
    report = mt.evaluate(lm, depths=(1, 4), num_batches=1, votes=3)
    assert [row["depth"] for row in report.rows] == [1, 4]
    assert "3 votes" in str(report) and "votes" not in str(alone)
    # Few passes of a fresh model agree, and the mean of probabilities is never worse than theirs.
    assert report.rows[0]["loss"] != alone.rows[0]["loss"]
    assert all(0 <= row["exact_accuracy"] <= 1 for row in report.rows)


def test_a_typed_puzzle_is_watched_and_not_continued(lm: mt.Model) -> None:
    puzzle = ". 2 3 4 . 6" + "\n. . . . . ." * 5
    trace = lm.trace(puzzle, depth=3)
    assert trace.tokens.shape == (1, 37)
    assert len(trace.plot(position=1).axes) == 3
    np.testing.assert_array_equal(
        trace.top_ids[-1, 0, :, 0], np.argmax(lm(puzzle, depth=3).logits[0], axis=-1)
    )
    with pytest.raises(mt.UserError, match=r"model.attention.is_causal: is False"):
        lm.generate(puzzle)
