"""From texts to prepared rows to a run on them, by the command."""

import json
import pathlib

import pytest
from absl import logging

from megatransformer_jax.checkpoints.compatibility import CheckpointMismatch
from megatransformer_jax.cli.commands import main
from megatransformer_jax.config.build import build
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.runs.prepare import prepare
from megatransformer_jax.runs.tokenizers import start_tokenizer
from megatransformer_jax.runs.train import train
from megatransformer_jax.training.loop import StopRequest
from megatransformer_jax.training.recorder import read_metrics

TRAINED = {"kind": "sentencepiece"}


@pytest.fixture(scope="module")
def values(small_run):
    """Values of a run that trains a tokenizer on the embedded texts."""
    data = {"tokenizer": {**TRAINED, "max_training_bytes": 50_000}}
    return lambda workdir, changes=None: small_run(
        workdir, {"model": {"vocab_size": 400}, "data": {**data, **(changes or {})}}
    )


@pytest.fixture(scope="module")
def prepared(values, tmp_path_factory) -> pathlib.Path:
    """Embedded texts, prepared by the command."""
    place = tmp_path_factory.mktemp("prepared")
    (place / "run.json").write_text(json.dumps(values(place / "run")))
    arguments = [f"--config={place}/run.json", f"--output={place}/rows", "--workers=1"]
    main("prepare", [*arguments, "--shard_mb=1"])
    return place / "rows"


def on_rows(*folders: pathlib.Path, **more) -> dict:
    return {"source": "tokens", "files": [str(folder) for folder in folders], **more}


def test_a_second_call_has_nothing_to_do(prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.glob("*.array_record")}
    arguments = [f"--config={prepared.parent}/run.json", f"--output={prepared}", "--shard_mb=1"]
    main("prepare", arguments)
    assert "nothing was left to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in prepared.glob("*.array_record")}


@pytest.fixture(scope="module")
def other(prepared, small_run) -> pathlib.Path:
    """Other rows by the same tokenizer, which is named as a file."""
    place = prepared.parent / "other"
    tokenizer = {**TRAINED, "model_file": str(prepared / "tokenizer.model")}
    data = {"tokenizer": tokenizer, "validation_fraction": 0.5}
    prepare(build(small_run(place, {"model": {"vocab_size": 400}, "data": data})), str(place))
    return place


def test_the_tokenizer_is_copied_and_read_again(prepared, other, values, tmp_path):
    config = build(values(tmp_path, on_rows(prepared, other, mixture=[1, 2])))
    tokenizer = start_tokenizer(config, tmp_path)
    model = (prepared / "tokenizer.model").read_bytes()
    assert tokenizer.model == model == (other / "tokenizer.model").read_bytes()
    assert (tmp_path / "tokenizer.model").read_bytes() == model
    assert start_tokenizer(config, tmp_path).digest() == tokenizer.digest()


def test_a_run_on_a_mixture_resumes(small_run, tmp_path, monkeypatch):
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        data = {"seed": seed, "validation_fraction": 0.3}
        prepare(build(small_run(folder, {"data": data})), str(folder), num_workers=1)
    data = on_rows(*folders, mixture=[1, 2])

    def run(name: str, last: int, **changes) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(StopRequest, "is_due", lambda self, step: step == last)
            return train(build(small_run(tmp_path / name, {"data": {**data, **changes}}))).step

    assert run("whole", 3) == 3
    assert run("stopped", 1) == 1
    with pytest.raises(CheckpointMismatch, match=r"data.mixture: saved \[1.*\], now \[1.* 1"):
        run("stopped", 3, mixture=[1, 1])
    with pytest.raises(CheckpointMismatch, match="the data has changed"):
        run("stopped", 3, files=[str(folder) for folder in reversed(folders)])
    # Folders may move: what is in them is compared, not where they are.
    moved = tmp_path / "moved"
    folders[0].rename(moved)
    assert run("stopped", 3, files=[str(moved), str(folders[1])]) == 3
    rows, others = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("stopped", "whole")
    )
    assert rows == others and len(rows) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": {"kind": "bytes"}}, "made by another tokenizer"),
        ({"tokenizer": {**TRAINED, "vocab_size": 390}}, r"tokenizer.vocab_size: 390 would be ign"),
        ({"sequence_length": 8}, "data.sequence_length: 8, but the rows"),
    ],
)
def test_a_run_that_reads_otherwise_is_refused(changes, message, prepared, values, tmp_path):
    config = build(values(tmp_path, {**on_rows(prepared), **changes}))
    with pytest.raises(UserError, match=message):
        start_tokenizer(config, tmp_path)


def test_bytes_must_be_named(small_run, tmp_path):
    prepare(build(small_run(tmp_path)), str(tmp_path / "rows"), num_workers=1)
    assert not list((tmp_path / "rows").glob("tokenizer*"))
    rows = on_rows(tmp_path / "rows", tokenizer=TRAINED)
    config = build(small_run(tmp_path, {"model": {"vocab_size": 400}, "data": rows}))
    with pytest.raises(ConfigError, match=r"data.tokenizer.kind: .* prepared with bytes; set it"):
        start_tokenizer(config, tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"source": "reasoning", "tokenizer": {"kind": "sentencepiece"}},
            "'reasoning' is not text",
        ),
        ({"source": "tokens", "files": ["a"]}, "data.source: 'tokens' is prepared already"),
        ({"packing": "bucket"}, "data.packing: 'bucket' makes batches whose rows differ"),
        (
            {"augmentation": {"synonyms_file": "a.tsv", "synonym_rate": 0.5}},
            "data.augmentation.synonyms_file: 'a.tsv' would be ignored because texts are tokenised",
        ),
    ],
)
def test_what_cannot_be_prepared_is_refused(data, message, small_run, tmp_path):
    with pytest.raises(ConfigError, match=message):
        prepare(build(small_run(tmp_path, {"data": data})), str(tmp_path / "rows"))
    assert not (tmp_path / "rows").exists()


def test_a_folder_of_something_else_is_refused(small_run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"output: .* something else .*'config.json'"):
        prepare(build(small_run(tmp_path)), str(tmp_path))


def test_progress_is_logged_where_there_is_no_bar(small_run, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("megatransformer_jax.runs.prepare._LINE_S", 0.0)
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    prepare(build(small_run(tmp_path)), str(tmp_path / "rows"), num_workers=1)
    assert any("documents" in line and "MB/s  eta" in line for line in lines)
