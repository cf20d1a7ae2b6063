import io
import sys
import types

import numpy as np
import pytest
import soundfile
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatransformer_jax.config.loop import LoggingConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.training.writers import WandbWriter, build_writer


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_back_what_was_written(tmp_path):
    writer = build_writer(LoggingConfig(), tmp_path, is_primary=True)
    writer.write_hparams({"width": 64, "name": "x", "shape": (1, 2)})
    writer.write_scalars(3, {"train/loss": np.float32(1.5)})
    writer.write_scalars(4, {"train/loss": 1.25})
    writer.write_images(4, {"one": np.zeros((4, 5, 3), np.uint8), "two": np.ones((2, 4, 5, 1))})
    writer.write_texts(4, {"sample": "hello"})
    writer.write_histograms(4, {"weights": np.arange(10.0)}, {"weights": 5})
    writer.close()
    read = events(tmp_path / "events")
    points = [(point.step, point.value) for point in read.Scalars("train/loss")]
    assert points == [(3, 1.5), (4, 1.25)]
    assert set(read.Tags()["images"]) == {"one", "two/0", "two/1"}
    assert read.Images("one")[0].width == 5
    assert read.Tensors("sample/text_summary")[0].tensor_proto.string_val[0] == b"hello"
    assert read.Histograms("weights")[0].histogram_value.num == 10
    assert "_hparams_/session_start_info" in read.summary_metadata


def test_a_resumed_run_hides_the_steps_it_runs_again(tmp_path):
    first = build_writer(LoggingConfig(), tmp_path, is_primary=True)
    for step in range(1, 6):
        first.write_scalars(step, {"loss": 1.0})
    first.close()
    second = build_writer(LoggingConfig(), tmp_path, is_primary=True, start_step=3)
    for step in range(3, 6):
        second.write_scalars(step, {"loss": 2.0})
    second.close()
    points = [(p.step, p.value) for p in events(tmp_path / "events").Scalars("loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_a_clock_that_is_set_back_keeps_the_order_of_starts(tmp_path, monkeypatch):
    """TensorBoard reads files by name, and names have the second."""
    for start_step, value in ((0, 1.0), (3, 2.0), (4, 3.0)):
        writer = build_writer(LoggingConfig(), tmp_path, is_primary=True, start_step=start_step)
        for step in range(start_step or 1, 6):
            writer.write_scalars(step, {"loss": value})
        writer.close()
        monkeypatch.setattr("time.time", lambda: 1_000_000_000.0)
    names = sorted(path.name for path in (tmp_path / "events").iterdir())
    assert [name.rpartition(".")[2] for name in names] == ["00000000", "00000003", "00000004"]
    points = [(p.step, p.value) for p in events(tmp_path / "events").Scalars("loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 3.0)]


def test_tensorboard_reads_back_the_sound_that_was_written(tmp_path):
    writer = build_writer(LoggingConfig(), tmp_path, is_primary=True)
    wave = np.sin(np.arange(400.0) / 8)[None, :, None]
    writer.write_audios(7, {"one": wave, "two": np.concatenate([wave, -wave])}, sample_rate=8000)
    writer.close()
    read = events(tmp_path / "events")
    assert set(read.Tags()["audio"]) == {"one", "two/0", "two/1"}
    (event,) = read.Audio("one")
    assert (event.step, event.sample_rate, event.length_frames) == (7, 8000, 400)
    samples, rate = soundfile.read(io.BytesIO(event.encoded_audio_string))
    assert rate == 8000
    np.testing.assert_allclose(samples, wave[0, :, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("method", "values", "problem"),
    [
        ("write_images", np.full((4, 4, 3), -0.1), r"m: images .* from -0.1 to -0.1.*\[0, 1\]"),
        ("write_images", np.full((4, 4, 3), np.nan), "from nan to nan"),
        ("write_images", np.zeros((4, 4)), r"shape \(4, 4\)"),
        ("write_images", np.zeros((4, 4, 2)), "1 channel, grey, or 3"),
        ("write_images", np.zeros((4, 4, 3), int), "type int64"),
        ("write_audios", np.full((1, 8, 1), 1.5), r"m: sound .*1.5.*\[-1, 1\]; divide"),
        ("write_audios", np.zeros((1, 8)), r"shape \(1, 8\)"),
        ("write_audios", np.zeros((1, 0, 1)), "at least one sample"),
        ("write_audios", np.zeros((1, 8, 1), np.int16), "type int16"),
    ],
)
def test_what_is_no_image_or_sound_is_an_error(tmp_path, method, values, problem):
    writer = build_writer(LoggingConfig(), tmp_path, is_primary=True)
    options = {"sample_rate": 8000} if method == "write_audios" else {}
    with pytest.raises(ValueError, match=problem):
        getattr(writer, method)(1, {"m": values}, **options)


def test_other_processes_write_nothing(tmp_path):
    writer = build_writer(LoggingConfig(), tmp_path, is_primary=False)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_wandb_absent_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = LoggingConfig(writers=("wandb",), wandb_project="p")
    with pytest.raises(
        UserError, match=r"'wandb' in logging\.writers: .*'megatransformer_jax\[wandb\]'"
    ):
        build_writer(config, tmp_path, is_primary=True)


class FakeRun:
    def __init__(self):
        self.logged, self.config, self.is_finished = [], {}, False
        self.config = types.SimpleNamespace(update=lambda values, allow_val_change: None)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True


def test_wandb_run_is_continued_after_resume(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        return FakeRun()

    fake = types.SimpleNamespace(
        init=init,
        util=types.SimpleNamespace(generate_id=lambda: "abc"),
        Image=lambda array: ("image", array.shape),
        Audio=lambda array, sample_rate: ("audio", array.shape, sample_rate),
        Histogram=lambda array, num_bins: ("histogram", num_bins),
        Html=lambda text: ("html", text),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        writer = WandbWriter("project", tmp_path)
        writer.write_scalars(2, {"loss": np.float32(0.5)})
        writer.write_texts(2, {"sample": "<b>"})
        writer.write_images(2, {"image": np.zeros((2, 4, 4, 3))})
        writer.write_histograms(2, {"h": np.arange(3.0)})
        writer.write_audios(2, {"clip": np.zeros((2, 8, 1))}, sample_rate=8000)
        writer.write_hparams({"width": 3})
        writer.close()
    assert [call["id"] for call in calls] == ["abc", "abc"]
    assert calls[0]["resume"] == "allow" and calls[0]["project"] == "project"
    logged = writer._run.logged
    assert logged[0] == (2, {"loss": 0.5})
    assert logged[2][1]["image"] == [("image", (4, 4, 3))] * 2
    assert logged[4][1]["clip"] == [("audio", (8, 1), 8000)] * 2
    assert writer._run.is_finished
    # Samples are text, not markup.
    assert logged[1][1]["sample"] == ("html", "<pre>&lt;b&gt;</pre>")
