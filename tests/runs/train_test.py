"""Whole runs, in this process, on eight devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatransformer_jax.checkpoints.compatibility import CheckpointMismatch
from megatransformer_jax.config.build import build, load_config
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.runs.find_lr import find_learning_rate
from megatransformer_jax.runs.tasks import transformer
from megatransformer_jax.runs.train import train
from megatransformer_jax.training.loop import StopRequest
from megatransformer_jax.training.recorder import TooManyBadSteps, read_metrics
from megatransformer_jax.training.step import make_train_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def messages_from_info_upwards():
    """As `launch` sets it."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, small_run):
    """A run that nothing interrupts, with samples and with diagnostics that compile fast."""
    workdir = tmp_path_factory.mktemp("whole")
    samples = {"every_steps": 8, "max_new_tokens": 4, "prompts": ["The "]}
    diagnostics = {"every_steps": 8, "kinds": ["depth_draws", "recurrence"]}
    config = build(small_run(workdir, {"samples": samples, "diagnostics": diagnostics}))
    return config, workdir, train(config)


def stop_after(monkeypatch, step: int) -> None:
    monkeypatch.setattr(StopRequest, "is_due", lambda self, now: now == step)


@pytest.mark.parametrize(
    "augmentation",
    [
        {"synonyms_file": "/no/such/file.tsv", "synonym_rate": 0.5},
        {"back_translation": "no_such_module:function", "back_translation_rate": 0.5},
    ],
)
def test_a_wrong_augmentation_is_an_error_before_anything_is_made(
    augmentation, tmp_path, small_run
):
    workdir = tmp_path / "run"
    changes = {"data": {"augmentation": augmentation}}
    config = build(small_run(workdir, changes))
    with pytest.raises(ConfigError, match=f"data.augmentation.{next(iter(augmentation))}"):
        train(config)
    with pytest.raises(ConfigError, match=f"data.augmentation.{next(iter(augmentation))}"):
        find_learning_rate(config, 1e-4, 1e-1, 20)
    assert not workdir.exists()


def test_writes_everything_that_it_promises(whole_run):
    config, workdir, result = whole_run
    assert result.is_finished and result.step == 12
    assert {path.name for path in workdir.iterdir()} == {
        "checkpoints", "config.json", "depth_table.json", "depth_table.png", "diagnostics",
        "events", "metrics.jsonl", "train.log",
    }  # fmt: skip
    assert load_config(workdir / "config.json") == config
    assert [row["step"] for row in read_metrics(workdir / "metrics.jsonl")] == list(range(1, 13))
    table = json.loads((workdir / "depth_table.json").read_text())
    assert [row["depth"] for row in table["rows"]] == [1, 2, 4]
    log = (workdir / "train.log").read_text()
    assert "step 12/12" in log and "validation after step 8" in log
    assert "sample prompt_0 after step 8: The " in log
    assert "parameters: " in log and "mesh: data 8 x fsdp 1 x tensor 1 x sequence 1 on " in log
    assert "compiling the train step" in log
    assert "Validation by depth" in log and "2 *" in log


def test_tensorboard_shows_training_validation_and_samples(whole_run):
    events = EventAccumulator(str(whole_run[1] / "events"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [5, 10, 12]
    assert [point.step for point in events.Scalars("validation/loss")] == [8, 12]
    assert "prompt_0/text_summary" in events.Tags()["tensors"]
    assert "train/learning_rate" in events.Tags()["scalars"]


def test_diagnostics_know_what_was_drawn(whole_run):
    _, workdir, _ = whole_run
    folders = {path.name for path in (workdir / "diagnostics").iterdir()}
    assert folders == {"step_000008", "step_000012"}
    events = EventAccumulator(str(workdir / "events"))
    events.Reload()
    shown = [point.value for point in events.Scalars("diagnostics/mean_drawn_steps")]
    drawn = [row["num_steps"] for row in read_metrics(workdir / "metrics.jsonl")]
    np.testing.assert_allclose(shown, [np.mean(drawn[:8]), np.mean(drawn[8:])], rtol=1e-6)
    assert events.Tags()["images"] == ["diagnostics/depth_draws", "diagnostics/recurrence"]


def test_keeps_the_configured_checkpoints(whole_run):
    kept = {int(path.name) for path in (whole_run[1] / "checkpoints").iterdir()}
    assert kept >= {8, 12} and len(kept) <= 3


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    whole_run, tmp_path, small_run, monkeypatch
):
    stop_after(monkeypatch, 6)
    config = build(small_run(tmp_path))
    assert not train(config).is_finished
    monkeypatch.undo()
    stop_after(monkeypatch, 9)
    train(config)
    monkeypatch.undo()
    result = train(config)
    assert result.is_finished
    whole = (whole_run[1] / "metrics.jsonl").read_text()
    assert (tmp_path / "metrics.jsonl").read_text() == whole

    def compare(path, a, b):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, result.state, whole_run[2].state)


def test_a_finished_run_shows_its_table_again_and_trains_no_more(
    whole_run, tmp_path, small_run, capsys
):
    config, workdir, _ = whole_run
    before = (workdir / "metrics.jsonl").read_text()
    again = train(config)
    assert again.is_finished and int(again.state.step) == 12
    assert (workdir / "metrics.jsonl").read_text() == before
    assert "Validation by depth" in capsys.readouterr().out


def test_a_workdir_of_another_architecture_is_refused_at_once(whole_run, small_run):
    changed = build(small_run(whole_run[1], {"model": {"mlp": {"hidden_width": 32}}}))
    with pytest.raises(CheckpointMismatch, match=r"model\.mlp\.hidden_width: saved 16, now 32"):
        train(changed)
    # The refused run left no trace.
    assert load_config(whole_run[1] / "config.json") == whole_run[0]


def test_a_workdir_with_other_data_is_refused(whole_run, small_run):
    with pytest.raises(CheckpointMismatch, match=r"data\.seed: saved 0, now 7"):
        train(build(small_run(whole_run[1], {"data": {"seed": 7}})))


def test_a_start_that_fails_leaves_the_config_of_the_run(whole_run, small_run):
    config, workdir, _ = whole_run
    with pytest.raises(ConfigError, match="mesh"):
        train(build(small_run(workdir, {"mesh": {"data": 3}})))
    samples = {"every_steps": 4, "max_new_tokens": 1024, "prompts": ["The "]}
    with pytest.raises(ConfigError, match=r"samples\.max_new_tokens"):
        train(build(small_run(workdir, {"samples": samples})))
    assert load_config(workdir / "config.json") == config


def test_samples_too_long_for_the_model_are_refused_at_once(tmp_path, small_run):
    changes = {
        "model": {"max_length": 16},
        "samples": {"every_steps": 8, "max_new_tokens": 12, "prompts": ["ab", "abcd"]},
    }
    with pytest.raises(
        ConfigError,
        match=r"samples\.max_new_tokens: 12 after the 5 tokens .* 'abcd' exceed model\.max_length"
        r"=16; use at most 11, or shorten samples\.prompts",
    ):
        train(build(small_run(tmp_path, changes)))
    assert not (tmp_path / "config.json").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, small_run):
    with pytest.raises(ConfigError, match=r"workdir: '/proc' cannot be written to"):
        train(build(small_run("/proc")))
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match=r"compilation_cache_dir: .* cannot be written to"):
        train(build(small_run(tmp_path, {"compilation_cache_dir": path})))


def test_processes_without_a_cluster_are_refused(tmp_path, small_run, monkeypatch):
    def initialize(**timeouts):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match=r"distributed\.coordinator: .*num_processes.*process_id"):
        train(build(small_run(tmp_path, {"distributed": {"enabled": True}})))


def spoil_steps(monkeypatch, first: int, last: int) -> None:
    """Makes the loss of these steps not finite."""

    def make(*arguments):
        step_function = make_train_step(*arguments)

        def spoiled(state, batch):
            step = state.step + 1
            factor = jnp.where((step >= first) & (step <= last), jnp.nan, 1.0)
            return step_function(state, batch._replace(loss_mask=batch.loss_mask * factor))

        return spoiled

    monkeypatch.setattr(transformer, "make_train_step", make)


def test_a_run_that_diverges_goes_on_with_a_lower_learning_rate(
    tmp_path, small_run, monkeypatch, caplog
):
    values = {
        "train": {"steps": 6, "max_bad_steps": 3},
        "checkpoint": {"every_steps": 1, "keep_best": 0},
        "evaluation": {"final_depths": [2]},
    }
    spoil_steps(monkeypatch, 4, 6)
    with pytest.raises(TooManyBadSteps, match=r"lower optimizer\.learning_rate"):
        train(build(small_run(tmp_path, values)))
    monkeypatch.undo()
    saved = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert max(saved) == 3
    values["optimizer"] = {"learning_rate": 1e-3, "clip_norm": None}
    with caplog.at_level("WARNING", logger="absl"):
        result = train(build(small_run(tmp_path, values)))
    assert result.is_finished and int(result.state.skipped_steps) == 0
    assert "optimizer.learning_rate: saved 0.003, now 0.001" in caplog.text
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[3]["learning_rate"] < 1e-3


def test_skipped_steps_and_a_bad_last_loss_are_told_at_the_end(
    tmp_path, small_run, monkeypatch, caplog
):
    spoil_steps(monkeypatch, 4, 4)
    with caplog.at_level("WARNING", logger="absl"):
        train(build(small_run(tmp_path, {"train": {"steps": 4}})))
    assert "the updates of 1 of 4 steps were skipped" in caplog.text
    assert "the loss of the last step is not finite: nan" in caplog.text


def test_fewer_steps_than_done_is_refused(whole_run, small_run):
    with pytest.raises(ConfigError, match=r"train\.steps: 10, but .* already has step 12"):
        train(build(small_run(whole_run[1], {"train": {"steps": 10}})))


def test_a_run_can_be_extended(tmp_path, small_run, monkeypatch, caplog):
    stop_after(monkeypatch, 2)
    evaluation = {"final_depths": [2]}
    train(build(small_run(tmp_path, {"train": {"steps": 4}, "evaluation": evaluation})))
    monkeypatch.undo()
    with caplog.at_level("WARNING", logger="absl"):
        longer = {"train": {"steps": 6}, "evaluation": evaluation}
        result = train(build(small_run(tmp_path, longer)))
    assert result.step == 6
    assert any("train.steps: saved 4, now 6" in message for message in caplog.messages)


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path, small_run):
    # Bytes are always 259 ids: only the model's number can be changed.
    message = (
        r"model\.vocab_size: 100 is less than the 259 ids .* set model.vocab_size=259 or more\.$"
    )
    with pytest.raises(ConfigError, match=message):
        train(build(small_run(tmp_path, {"model": {"vocab_size": 100}})))


def test_reasoning_without_recurrence_has_a_table_of_one_row(tmp_path, small_run, capsys):
    values = small_run(tmp_path)
    values["model"] = {
        "vocab_size": 16, "width": 16, "core_layers": 0, "attention": {"num_heads": 2},
        "mlp": {"hidden_width": 16},
    }  # fmt: skip
    values["data"] = {
        "source": "reasoning", "batch_size": 8, "sequence_length": 12,
        "reasoning": {
            "max_length": 4, "eval_min_length": 5, "eval_max_length": 8, "num_eval": 16
        },
    }  # fmt: skip
    values["train"] = {"steps": 4}
    values["samples"] = {"every_steps": 2}
    train(build(values))
    table = json.loads((tmp_path / "depth_table.json").read_text())
    assert [row["depth"] for row in table["rows"]] == [None]
    assert "exact answers" in capsys.readouterr().out
    log = (tmp_path / "train.log").read_text()
    assert "sample problem_0 after step 2" in log and "wanted: " in log
