"""The best checkpoints by any metric, and what the rules keep."""

import math

import pytest

from megatransformer_jax.checkpoints.manager import (
    CheckpointManager,
    Ranking,
    SavedCheckpoint,
    kept_steps,
    stored_score,
)
from megatransformer_jax.config.loop import REASONING_METRICS, TEXT_METRICS, CheckpointConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.evaluation.validation import (
    PROBLEM_SCORES,
    TEXT_SCORES,
    ScoreHook,
    Scores,
    scores_by_name,
)

LOSS, ACCURACY = "validation/loss", "validation/accuracy"


def saved(values: dict[int, dict[str, float] | None]) -> list[SavedCheckpoint]:
    return [SavedCheckpoint(step, scores) for step, scores in values.items()]


def test_a_ranking_has_both_directions_and_ignores_what_has_no_finite_score():
    scores = [{LOSS: 2.0}, None, {LOSS: math.nan}, {LOSS: 1.0}, {}, {LOSS: 2.0}, {LOSS: math.inf}]
    assert Ranking(LOSS, False).best(scores, 9) == [3, 0, 5]
    assert Ranking(LOSS, True).best(scores, 2) == [0, 5]
    assert Ranking(ACCURACY, True).best(scores, 2) == []


def test_scores_of_earlier_versions_are_read():
    assert stored_score({"validation_loss": 0.5}, LOSS) == 0.5
    assert stored_score({"validation_loss": 0.5}, ACCURACY) is None
    assert Ranking(LOSS, False).best([{"validation_loss": 0.5}, {LOSS: 0.25}], 1) == [1]


@pytest.mark.parametrize(
    ("metric", "mode", "is_higher_better"),
    [
        (LOSS, "auto", False),
        (ACCURACY, "auto", True),
        ("validation/exact_accuracy", "auto", True),
        (LOSS, "max", True),
        (ACCURACY, "min", False),
    ],
)
def test_the_mode_follows_from_the_metric_unless_given(metric, mode, is_higher_better):
    config = CheckpointConfig(best_metric=metric, best_mode=mode)
    assert Ranking.from_config(config) == (metric, is_higher_better)


def test_a_metric_that_validation_never_returns_is_an_error():
    with pytest.raises(ConfigError, match=r"'validation/ter' is not allowed.*'validation/loss'"):
        CheckpointConfig(best_metric="validation/ter")


@pytest.mark.parametrize(
    ("names", "known"), [(TEXT_SCORES, TEXT_METRICS), (PROBLEM_SCORES, REASONING_METRICS)]
)
def test_the_known_metrics_are_those_that_validation_returns(names, known):
    scores = Scores(1, 0.0, 1.0, 0.0, 0.0, 1)
    hook = ScoreHook(1, lambda params: scores_by_name(scores, names), lambda state: state)
    assert set(hook(1, None, {})) == set(known)


def test_what_the_rules_keep():
    checkpoints = saved({step: {ACCURACY: step % 40 / 40} for step in range(10, 110, 10)})
    config = CheckpointConfig(
        every_steps=10, keep_last=1, keep_best=2, best_metric=ACCURACY, keep_every_steps=50
    )
    assert kept_steps(config, checkpoints) == {30, 50, 70, 100}


def test_best_by_accuracy_survives_a_restart_and_a_reader_knows_the_runs_metric(tmp_path):
    config = CheckpointConfig(keep_last=1, keep_best=1, best_metric=ACCURACY)
    run = {"config": {"checkpoint": {"best_metric": ACCURACY, "best_mode": "auto"}}}
    manager = CheckpointManager(tmp_path, config)
    for step, accuracy in enumerate([0.5, 0.75, 0.25], 1):
        manager.save(step, {"params": {"a": [1.0]}}, {}, run, {LOSS: step, ACCURACY: accuracy})
    manager.close()
    reader = CheckpointManager(tmp_path, None)
    assert reader.steps() == [2, 3]
    assert reader.best_step() == 2
    assert reader.scores(2) == {LOSS: 2, ACCURACY: 0.75}
    assert reader.best_steps(Ranking(LOSS, False), 5) == [2, 3]
    reader.close()


def test_pruning_deletes_what_no_rule_keeps_and_counts_bytes(tmp_path):
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep_last=100))
    for step in (1, 2, 3, 4):
        manager.save(step, {"params": {"a": [1.0]}}, {}, {}, {LOSS: step})
    manager.wait()
    rules = CheckpointConfig(keep_last=1, keep_best=1)
    size = sum(path.stat().st_size for path in (tmp_path / "2").rglob("*") if path.is_file())
    planned = manager.prune(rules, is_dry_run=True)
    assert set(planned) == {2, 3} and planned[2] == size > 0
    assert manager.steps() == [1, 2, 3, 4]
    assert manager.prune(rules) == planned
    assert manager.steps() == [1, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4"]
    manager.close()
    reader = CheckpointManager(tmp_path, None)
    with pytest.raises(ValueError, match="for reading only"):
        reader.prune(rules)
    reader.close()
