"""The loop, its recorder and its hooks, with a step that trains one number."""

import io
import itertools
import logging
import os
import re
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging

from megatransformer_jax.checkpoints.save_times import SaveTimer
from megatransformer_jax.config.option import UserError
from megatransformer_jax.training.loop import (
    CheckHook,
    CheckpointHook,
    LoopServices,
    SampleHook,
    StopRequest,
    is_due,
    train_loop,
)
from megatransformer_jax.training.progress import LineProgress
from megatransformer_jax.training.recorder import (
    MetricRecorder,
    MetricsFile,
    TooManyBadSteps,
    read_metrics,
)
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.writers import MultiWriter


class ListWriter(MultiWriter):
    def __init__(self):
        super().__init__(())
        self.scalars = []
        self.texts = []

    def write_scalars(self, step, scalars):
        self.scalars.append((step, dict(scalars)))

    def write_texts(self, step, texts):
        self.texts.append((step, dict(texts)))


class RecordingHook:
    def __init__(self, every_steps, at_end=False, at_stop=False, result=None, log=None, name=""):
        self.every_steps, self.at_end, self.at_stop = every_steps, at_end, at_stop
        self.skips_bad_steps = False
        self.result, self.log, self.name = result or {}, [] if log is None else log, name

    def __call__(self, step, state, scalars):
        self.log.append((self.name, step, float(jax.device_get(state.params["w"])), dict(scalars)))
        return self.result


def fresh_state() -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params={"w": jnp.float32(8.0)},
        opt_state=(),
        key_data=jax.random.key_data(jax.random.key(0)),
        # Arrays of their own: a donated state must not hold one buffer twice.
        skipped_steps=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


@jax.jit
def halve(state, batch):
    """Halves w; a batch that is not finite is skipped."""
    is_finite = jnp.isfinite(batch)
    skipped = 1 - is_finite.astype(jnp.int32)
    new = state.replace(
        step=state.step + 1,
        params={"w": jnp.where(is_finite, state.params["w"] / 2, state.params["w"])},
        skipped_steps=state.skipped_steps + skipped,
        skipped_in_row=(state.skipped_in_row + 1) * skipped,
    )
    metrics = {
        "loss": state.params["w"] + batch,
        "grad_norm": batch,
        "skipped_in_row": new.skipped_in_row.astype(jnp.float32),
        "skipped_steps": new.skipped_steps.astype(jnp.float32),
    }
    return new, metrics


class Run:
    """One call of the loop with everything at hand."""

    def __init__(self, tmp_path, batches=None, total_steps=6, max_bad_steps=3, start_step=0):
        self.writer = ListWriter()
        self.path = tmp_path / "metrics.jsonl"
        self.file = MetricsFile(self.path, start_step)
        self.total_steps, self.start_step = total_steps, start_step
        self.batches = batches or [np.float32(0)] * total_steps
        self.progress = LineProgress(total_steps)
        self.recorder = MetricRecorder(
            metrics_file=self.file,
            writer=self.writer,
            progress=self.progress,
            learning_rate=lambda step: 0.1 * step,
            max_bad_steps=max_bad_steps,
        )

    def __call__(self, hooks=(), step=halve, log_every_steps=2, place=jax.device_put, stop=None):
        services = LoopServices(
            hooks=hooks,
            recorder=self.recorder,
            writer=self.writer,
            progress=self.progress,
            stop=stop or StopRequest(),
            log_every_steps=log_every_steps,
        )
        return train_loop(
            fresh_state(),
            step,
            map(place, self.batches),
            services,
            start_step=self.start_step,
            total_steps=self.total_steps,
        )


def test_every_step_is_in_the_file_and_means_go_to_the_writer(tmp_path):
    run = Run(tmp_path, total_steps=5)
    result = run()
    assert result.is_finished and result.step == 5
    rows = read_metrics(run.path)
    assert [row["loss"] for row in rows] == [8.0, 4.0, 2.0, 1.0, 0.5]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    points = [(step, s["train/loss"], s["train/learning_rate"]) for step, s in run.writer.scalars]
    assert points == [(2, 6.0, 0.1), (4, 1.5, pytest.approx(0.3)), (5, 0.5, 0.4)]


def test_the_learning_rate_is_that_of_the_updates_made(tmp_path):
    """A skipped step leaves the optimiser's count as it was."""
    batches = [np.float32(value) for value in (0, np.nan, np.nan, 0, np.nan, 0)]
    run = Run(tmp_path, batches)
    run()
    rates = [row["learning_rate"] for row in read_metrics(run.path)]
    assert rates == pytest.approx([0, 0.1, 0.1, 0.1, 0.2, 0.2])


def test_hooks_run_when_due_in_order_and_see_earlier_results(tmp_path):
    log = []
    hooks = [
        RecordingHook(2, at_end=True, result={"validation/loss": 1.5}, log=log, name="validate"),
        RecordingHook(3, log=log, name="save"),
    ]
    run = Run(tmp_path, total_steps=7)
    run(hooks)
    assert [(name, step) for name, step, *_ in log] == [
        ("validate", 2), ("save", 3), ("validate", 4), ("validate", 6), ("save", 6),
        ("validate", 7),
    ]  # fmt: skip
    assert log[4] == ("save", 6, 8 / 2**6, {"validation/loss": 1.5})
    assert log[1][3] == {}
    assert (6, {"validation/loss": 1.5}) in run.writer.scalars


def test_the_file_holds_a_step_before_its_hooks_run(tmp_path):
    run = Run(tmp_path, total_steps=3)
    seen = []

    class Hook(RecordingHook):
        def __call__(self, step, state, scalars):
            seen.append([row["step"] for row in read_metrics(run.path)])
            return {}

    run([Hook(1)], log_every_steps=100)
    assert seen == [[1], [1, 2], [1, 2, 3]]


def test_implicit_transfers_inside_the_step_are_errors(tmp_path):
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        Run(tmp_path)(place=lambda batch: batch)


def test_steps_are_not_waited_for_between_log_points(tmp_path):
    fetched = []
    run = Run(tmp_path, total_steps=6)
    flush = run.recorder.flush
    run.recorder.flush = lambda: (fetched.append(len(run.recorder._waiting)), flush())[1]
    run(log_every_steps=3)
    assert fetched == [3, 3]


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path):
    bad = np.float32(np.nan)
    batches = [np.float32(0), bad, bad, np.float32(0), bad, bad, bad, np.float32(0)]
    run = Run(tmp_path, batches, total_steps=8, max_bad_steps=3)
    with pytest.raises(TooManyBadSteps, match=r"last 3 steps up to step 7 .*learning_rate.*newest"):
        run(log_every_steps=8)
    # What is on file shows what happened.
    assert len(read_metrics(run.path)) == 8


def test_fewer_bad_steps_are_skipped_counted_and_reported(tmp_path, caplog):
    bad = np.float32(np.inf)
    run = Run(tmp_path, [np.float32(0), bad, bad, np.float32(0)], total_steps=4)
    with caplog.at_level("INFO", logger="absl"):
        result = run(log_every_steps=4)
    assert float(result.state.params["w"]) == 2.0
    assert run.writer.scalars[-1][1]["train/skipped_steps"] == 2.0
    assert "skipped 2" in caplog.messages[-1]


@pytest.mark.parametrize(("last_is_bad", "wanted"), [(False, [1, 4, 5]), (True, [1, 4, 5])])
def test_no_checkpoint_is_saved_after_a_bad_step_but_at_the_end(tmp_path, last_is_bad, wanted):
    good, bad = np.float32(0), np.float32(np.nan)
    batches = [good, bad, bad, good, bad if last_is_bad else good]
    saved, validated = [], []
    hooks = [
        RecordingHook(1, log=validated),
        CheckpointHook(1, lambda step, state, loss: saved.append(step) or {}),
    ]
    run = Run(tmp_path, batches, total_steps=5)
    run(hooks, log_every_steps=100)
    assert saved == wanted
    assert [step for _, step, *_ in validated] == [1, 2, 3, 4, 5]
    assert run.recorder.skipped_in_row == int(last_is_bad)


def test_a_stop_in_the_middle_of_bad_steps_is_saved(tmp_path):
    saved = []
    stop = StopRequest()
    stop.is_due = lambda step: step == 3
    save = CheckpointHook(1, lambda step, state, loss: saved.append(step) or {})
    Run(tmp_path, [np.float32(0)] + [np.float32(np.nan)] * 4, total_steps=5)([save], stop=stop)
    assert saved == [1, 3]


def test_data_that_ends_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="ended before step 3"):
        Run(tmp_path, [np.float32(0)] * 2, total_steps=5)()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_and_saves(tmp_path, number):
    saved = []

    def place(batch):
        if len(placed) == 2:
            os.kill(os.getpid(), number)
        placed.append(batch)
        return jax.device_put(batch)

    placed = []
    save = CheckpointHook(100, lambda step, state, scores: saved.append((step, scores)) or {})
    run = Run(tmp_path, total_steps=6)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        result = run([RecordingHook(100, at_end=True), save], stop=stop, place=place)
    assert not result.is_finished and result.step == 3
    assert saved == [(3, {})]
    assert len(read_metrics(run.path)) == 3
    assert signal.getsignal(number) is before


def test_sigterm_before_the_first_step_ends_the_process_at_once(monkeypatch, caplog):
    """The compiler may hold the main thread for minutes, and there is nothing to save."""
    ended, released = threading.Event(), []
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    with StopRequest(before_exit=lambda: released.append(True)) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(10)
        assert (codes, released) == ([128 + signal.SIGTERM], [True])
        assert "there is nothing to save" in caplog.text
        stop.is_due(1)
    # After a step it is saved.
    for has_steps in (True, False):
        with StopRequest(has_steps=has_steps) as stop:
            if not has_steps:
                assert not stop.is_due(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_due(2)
    assert len(codes) == 1
    assert signal.set_wakeup_fd(-1) == -1


def test_what_failed_in_the_background_ends_the_run_at_the_next_report(tmp_path):
    looks = []

    def check():
        looks.append(True)
        if len(looks) == 2:
            raise UserError("the save failed")

    run = Run(tmp_path, total_steps=9)
    with pytest.raises(UserError, match="the save failed"):
        run([CheckHook(3, check)])
    assert len(read_metrics(run.path)) == 6


def test_the_second_ctrl_c_interrupts_at_once():
    # Workers of pytest-xdist ignore Ctrl-C, programs do not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.is_due(1)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
    finally:
        signal.signal(signal.SIGINT, before)


class StreamWithASignal(io.StringIO):
    """Like stderr's buffer, which refuses to be written to in the middle of a write."""

    is_writing = False

    def write(self, text: str) -> int:
        if self.is_writing:
            raise RuntimeError("reentrant call")
        self.is_writing = True
        if "step" not in self.getvalue():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # Python calls the handler between two instructions.
        self.is_writing = False
        return super().write(text)


def test_a_signal_in_the_middle_of_a_line_of_the_log_is_not_lost():
    stream = StreamWithASignal()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        with StopRequest(has_steps=True) as stop:
            absl_logging.error("step 3")
        assert stop.is_due(3)
    finally:
        logger.removeHandler(handler)
    assert re.match(r"step 3\nSIGTERM: finishing this step", stream.getvalue())


def test_a_finished_run_does_nothing(tmp_path):
    run = Run(tmp_path, total_steps=4, start_step=4)
    result = run([RecordingHook(1)])
    assert result.is_finished and result.step == 4
    assert read_metrics(run.path) == []
    # Fewer steps than were done: it ended where it was, not earlier.
    run.total_steps = 3
    assert run().step == 4


def test_a_stop_that_comes_with_the_last_step_finds_the_run_finished(tmp_path):
    stop, calls = StopRequest(), []
    stop.request()
    hook = RecordingHook(9, at_end=True, at_stop=True, log=calls)
    result = Run(tmp_path, total_steps=1)([hook], stop=stop)
    assert (result.is_finished, result.step) == (True, 1)
    assert [step for _, step, *_ in calls] == [1]


def test_last_step_is_saved_with_its_validation_scalars(tmp_path):
    saved = []
    hooks = [
        RecordingHook(4, at_end=True, result={"validation/loss": 0.25, "other/x": 1.0}),
        CheckpointHook(2, lambda step, state, scores: saved.append((step, scores)) or {}),
    ]
    Run(tmp_path, total_steps=5)(hooks)
    scores = {"validation/loss": 0.25}
    assert saved == [(2, {}), (4, scores), (5, scores)]


def test_a_save_by_the_clock_comes_at_a_report_and_counts_from_the_last_save(tmp_path):
    """Reports after 2, 4, 6 ..., a save by steps after 5, and a step takes half a minute."""
    saved, minutes = [], itertools.count(step=0.5)
    clock = [0.0]

    def place(batch):
        clock[0] = 60 * next(minutes)
        return jax.device_put(batch)

    timer = SaveTimer(1.5, now=lambda: clock[0])
    save = CheckpointHook(5, lambda step, state, scores: saved.append(step) or {}, timer)
    batches = [np.float32(0)] * 7 + [np.float32(np.nan)] + [np.float32(0)] * 4
    Run(tmp_path, batches, total_steps=12)([save], place=place)
    # 8 is due as well (1.5 minutes after 5), but its update was skipped; 10 is due by its number.
    assert saved == [4, 5, 10, 12]


def test_samples_are_logged_and_written(tmp_path, caplog):
    run = Run(tmp_path, total_steps=4)
    hook = SampleHook(2, lambda state, step: {"p": f"w after {step}"}, run.writer.write_texts)
    with caplog.at_level("INFO", logger="absl"):
        run([hook])
    assert run.writer.texts == [(2, {"p": "w after 2"}), (4, {"p": "w after 4"})]
    assert any("w after 4" in message for message in caplog.messages)


def test_hooks_with_interval_zero_never_run():
    hook = SampleHook(0, lambda state, step: {}, lambda step, texts: None)
    assert not is_due(hook, 10, is_last=True, is_stopping=False)
    assert not is_due(hook, 10, is_last=False, is_stopping=True)
