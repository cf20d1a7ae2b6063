import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.option import UserError
from megatransformer_jax.training.recorder import MetricsFile, read_metrics


@given(st.integers(0, 2**32 - 1))
def test_every_float32_reads_back_to_the_same_bits(tmp_path_factory, bits):
    value = np.uint32(bits).view(np.float32)
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write([(1, {"loss": float(value)})])
    file.close()
    read = np.float32(read_metrics(path)[0]["loss"])
    assert read.view(np.uint32) == bits or (np.isnan(read) and np.isnan(value))


def test_lines_are_valid_json_even_for_values_that_are_not_finite(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file.write([(1, {"loss": math.nan, "norm": math.inf})])
    file.close()
    line = (tmp_path / "m.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": "nan", "norm": "inf"}
    row = read_metrics(tmp_path / "m.jsonl")[0]
    assert math.isnan(row["loss"]) and row["norm"] == math.inf


def test_resume_drops_later_steps_and_a_half_written_line(tmp_path):
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path, 0)
    file.write([(step, {"loss": float(step)}) for step in range(1, 8)])
    file.close()
    with open(path, "a") as raw:
        raw.write('{"step": 8, "lo')
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 8))
    file = MetricsFile(path, 5)
    file.write([(6, {"loss": 60.0})])
    file.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)[4:]] == [(5, 5.0), (6, 60.0)]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    MetricsFile(path, 0).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3, "lo\n', b"\0\0\0\0", b"\xff\n"])
def test_a_cut_last_line_is_dropped_with_a_warning(tmp_path, tail, caplog):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n' + tail)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with caplog.at_level("WARNING", logger="absl"):
        MetricsFile(path, 2).close()
    assert "its last line is cut off" in caplog.text
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'


@pytest.mark.parametrize("garbage", ["garbage", '{"loss": 1.0}', "3", '{"step": 1, "lo', ""])
def test_any_other_line_that_cannot_be_read_is_named_and_a_run_goes_on(tmp_path, garbage, caplog):
    path = tmp_path / "m.jsonl"
    text = f'{{"step": 1, "loss": 1.0}}\n{garbage}\n{{"step": 3, "loss": 0.5}}\n'
    for copy in ("m.jsonl.damaged", "m.jsonl.damaged1"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"m\.jsonl, line 2: .* resume the run, which leaves"):
            read_metrics(path)
        assert path.read_text() == text
        with caplog.at_level("WARNING", logger="absl"):
            MetricsFile(path, 3).close()
        assert [row["step"] for row in read_metrics(path)] == [1, 3]
        assert (tmp_path / copy).read_text() == text
        assert f"line 2 ({garbage!r}); the file as it was is {copy}" in caplog.text
    assert "no metrics of 1 of the steps up to 3, where the run goes on: 2." in caplog.text


def test_lines_that_are_lost_are_told_and_a_file_that_was_moved_away_is_not(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    with caplog.at_level("WARNING", logger="absl"):
        file = MetricsFile(path, 4)  # The lines up to step 4 are elsewhere.
        file.write([(5, {"loss": 1.0}), (6, {"loss": 1.0})])
        file.close()
        MetricsFile(path, 6).close()
        assert caplog.text == ""
        MetricsFile(path, 20).close()
    assert "m.jsonl has no metrics of 14 of the steps up to 20" in caplog.text
    assert caplog.messages[0].endswith(": 7, 8, 9, 10, 11, 12, 13, 14, ....")


@pytest.mark.parametrize("text", ["garbage\n", "a\nb\n", "a\nb"])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="and no other line is; move the file away"):
        MetricsFile(path, 2)
    assert [one.name for one in tmp_path.iterdir()] == ["m.jsonl"] and path.read_text() == text
