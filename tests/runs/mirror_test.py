"""What a run writes arrives in the bucket; a folder stands for the bucket here."""

import json
import logging
import pathlib
import threading

import pytest

from megatransformer_jax.config.option import UserError
from megatransformer_jax.runs import mirror as mirroring
from megatransformer_jax.runs.mirror import Mirror, MirrorFailed
from megatransformer_jax.training.recorder import MetricsFile, read_metrics

LINE = len(json.dumps({"step": 1, "loss": 0.5})) + 1


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folder of the run; parts have three lines."""
    monkeypatch.setattr(mirroring, "PART_BYTES", 3 * LINE)
    monkeypatch.setattr(mirroring, "INTERVAL_S", 0.0)
    monkeypatch.setattr(mirroring, "_PAUSE_S", 0.0)
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


@pytest.fixture
def bucket(tmp_path):
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def write_steps(files: pathlib.Path, first: int, last: int) -> None:
    file = MetricsFile(files / "metrics.jsonl", first - 1)
    file.write([(step, {"loss": 0.5}) for step in range(first, last + 1)])
    file.close()


def parts(bucket: pathlib.Path) -> dict[str, int]:
    """Lines by the name of the part."""
    found = sorted((bucket / "metrics").iterdir())
    return {path.name: len(path.read_text().splitlines()) for path in found}


def test_metrics_arrive_in_parts_whose_last_one_grows(files, bucket):
    with Mirror(files, bucket, is_workdir=True) as mirror:
        mirror.start()
        write_steps(files, 1, 2)
        mirror.send_records()
        assert parts(bucket) == {"000000001.jsonl": 2}
        write_steps(files, 3, 8)
        (files / "metrics.jsonl").open("a").write('{"step": 9')  # Not written to its end.
        mirror.send_records()
        assert parts(bucket) == {
            "000000001.jsonl": 3,
            "000000004.jsonl": 3,
            "000000007.jsonl": 2,
        }
    assert [row["step"] for row in read_metrics(bucket)] == list(range(1, 9))


@pytest.mark.parametrize("last", [0, 3, 4, 7, 8])
def test_another_machine_goes_on_with_the_lines_up_to_its_checkpoint(files, bucket, tmp_path, last):
    with Mirror(files, bucket, is_workdir=True) as mirror:
        mirror.start()
        write_steps(files, 1, 8)
        (files / "train.log").write_text("a line\n")
    (other := tmp_path / "other").mkdir()
    with Mirror(other, bucket, is_workdir=True) as mirror:
        assert (other / "train.log").read_text() == "a line\n"
        assert (other / "metrics.jsonl").read_bytes() == (files / "metrics.jsonl").read_bytes()
        MetricsFile(other / "metrics.jsonl", last).close()
        mirror.start()
        # Dropped in the bucket too, before anything else happens.
        assert sum(parts(bucket).values()) == last
        write_steps(other, last + 1, 11)
    assert [row["step"] for row in read_metrics(bucket)] == list(range(1, 12))
    assert [row["step"] for row in read_metrics(other)] == list(range(1, 12))


def test_a_line_that_cannot_be_read_is_left_out_in_the_bucket_too(files, bucket, tmp_path):
    with Mirror(files, bucket, is_workdir=True) as mirror:
        mirror.start()
        write_steps(files, 1, 8)
    damaged = bucket / "metrics" / "000000004.jsonl"
    damaged.write_bytes(b"x" + damaged.read_bytes())
    (other := tmp_path / "other").mkdir()
    with Mirror(other, bucket, is_workdir=True) as mirror:
        MetricsFile(other / "metrics.jsonl", 8).close()
        mirror.start()
    assert [row["step"] for row in read_metrics(bucket)] == [1, 2, 3, 5, 6, 7, 8]
    assert sorted(parts(bucket)) == ["000000001.jsonl", "000000005.jsonl", "000000008.jsonl"]


def test_files_are_sent_when_they_have_changed_and_only_those_of_the_run(
    files, bucket, monkeypatch
):
    sent = []
    write = mirroring.write_atomically
    monkeypatch.setattr(
        mirroring,
        "write_atomically",
        lambda path, content: (sent.append(path), write(path, content)),
    )
    for name in ("config.json", "samples/a.txt", "checkpoints/10/x", "wandb/x", ".half.json.abc"):
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_text(name)
    with Mirror(files, bucket, is_workdir=False) as mirror:
        mirror.start()
        assert [path.relative_to(bucket).as_posix() for path in sent] == [
            "config.json",
            "samples/a.txt",
        ]
        (files / "config.json").write_text("other")
    assert len(sent) == 3
    assert (bucket / "config.json").read_text() == "other"


def test_a_copy_of_a_folder_is_made_afresh(files, bucket):
    (bucket / "metrics").mkdir()
    (bucket / "metrics" / "000000001.jsonl").write_text("of another run")
    write_steps(files, 1, 2)
    with Mirror(files, bucket, is_workdir=False) as mirror:
        mirror.start()
    assert [row["step"] for row in read_metrics(bucket)] == [1, 2]


def test_a_start_that_fails_leaves_the_bucket_as_it_is(files, bucket):
    (files / "train.log").write_text("why it failed")
    with pytest.raises(UserError), Mirror(files, bucket, is_workdir=True):
        raise UserError("another run")
    assert list(bucket.iterdir()) == []


def test_failures_warn_and_three_in_a_row_end_the_run(files, bucket, monkeypatch, caplog):
    tried = threading.Semaphore(0)
    mirror = Mirror(files, bucket, is_workdir=True)
    mirror.start()

    def fail(*arguments):
        tried.release()
        raise ConnectionError("no route")

    monkeypatch.setattr(mirroring, "write_atomically", fail)
    (files / "a.txt").write_text("a")
    with caplog.at_level(logging.WARNING):
        mirror.request()
        for _ in range(3):  # It tries again by itself.
            assert tried.acquire(timeout=10)
        with pytest.raises(MirrorFailed, match=r"3 times in a row \(ConnectionError: no route\)"):
            mirror.__exit__(None, None, None)
    assert caplog.text.count("trying again") >= 2


def test_a_bucket_that_has_ended_the_run_is_asked_once_more(files, bucket, monkeypatch):
    tries = []

    def fail(*arguments):
        tries.append(arguments)
        raise ConnectionError("no route")

    monkeypatch.setattr(mirroring, "_PAUSE_S", 0)
    with pytest.raises(MirrorFailed), Mirror(files, bucket, is_workdir=True) as mirror:
        mirror.start()
        (files / "train.log").write_text("a")
        monkeypatch.setattr(mirroring, "write_atomically", fail)
        mirror.send_records()
    assert len(tries) == mirroring.MAX_FAILURES + 1


def test_a_run_that_reports_does_not_wait_for_the_bucket(files, bucket, monkeypatch):
    arrived, may_go_on = threading.Event(), threading.Event()

    def slow(*arguments):
        arrived.set()
        assert may_go_on.wait(10)

    with Mirror(files, bucket, is_workdir=True) as mirror:
        mirror.start()
        monkeypatch.setattr(mirroring, "write_atomically", slow)
        (files / "a.txt").write_text("a")
        mirror.request()
        assert arrived.wait(10)
        mirror.request()  # Returns while the first round hangs.
        may_go_on.set()
