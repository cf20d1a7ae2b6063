"""The fingerprint sees what changes the data, and nothing else."""

import json
import pathlib
from collections.abc import Callable

import pytest

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data import fingerprint as fingerprint_module
from megatransformer_jax.data.fingerprint import data_fingerprint, training_text_identity


def lines(count: int) -> str:
    return "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(count))


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines(20))
    (folder / "b.jsonl").write_text(lines(5))
    return folder


def config(folder: pathlib.Path, **changes) -> DataConfig:
    return DataConfig(source="jsonl", files=(f"{folder}/*.jsonl",), **changes)


def append(folder: pathlib.Path) -> None:
    with (folder / "a.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')


def edit(folder: pathlib.Path) -> None:
    (folder / "b.jsonl").write_text(lines(5).replace("text 4", "text 9"))


def add(folder: pathlib.Path) -> None:
    (folder / "c.jsonl").write_text(lines(1))


def swap(folder: pathlib.Path) -> None:
    (folder / "a.jsonl").rename(folder / "z.jsonl")


@pytest.mark.parametrize("change", [append, edit, add, swap])
def test_a_change_of_the_files_is_seen(
    change: Callable[[pathlib.Path], None], corpus: pathlib.Path
):
    before = data_fingerprint(config(corpus))
    assert before == data_fingerprint(config(corpus))
    change(corpus)
    assert data_fingerprint(config(corpus)) != before


def test_the_same_content_elsewhere_is_the_same(corpus: pathlib.Path):
    before = data_fingerprint(config(corpus))
    assert before.startswith(f"2 files, {len(lines(20)) + len(lines(5))} bytes, sha256 ")
    moved = corpus.rename(corpus.parent / "moved")
    assert data_fingerprint(config(moved)) == before


def test_validation_files_count(corpus: pathlib.Path):
    held = corpus.parent / "held.jsonl"
    held.write_text(lines(2))
    settings = config(corpus, validation_files=(str(held),))
    before = data_fingerprint(settings)
    held.write_text(lines(3))
    assert data_fingerprint(settings) != before


@pytest.mark.parametrize("place", [0, 9_999, 5_000])
def test_a_long_file_is_sampled_at_both_ends_and_between(
    place: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fingerprint_module, "SAMPLED_BYTES", 300)
    monkeypatch.setattr(fingerprint_module, "BLOCK_BYTES", 100)
    monkeypatch.setattr(fingerprint_module, "MIN_BLOCKS", 3)
    path = tmp_path / "a.txt"
    content = bytearray(b"x" * 10_000)
    path.write_bytes(content)
    settings = DataConfig(source="text", files=(str(path),))
    before = data_fingerprint(settings)
    content[place] = ord("y")
    path.write_bytes(content)
    assert data_fingerprint(settings) != before


def test_embedded_text_and_problems_have_one():
    assert "records, sha256" in data_fingerprint(DataConfig())
    assert data_fingerprint(DataConfig(source="reasoning")) == "generated problems"


def test_the_training_texts_depend_on_the_split(corpus: pathlib.Path):
    identity = training_text_identity(config(corpus))
    assert json.loads(json.dumps(identity)) == identity
    for changes in ({"seed": 1}, {"validation_fraction": 0.5}):
        assert training_text_identity(config(corpus, **changes)) != identity
    assert training_text_identity(config(corpus, batch_size=2, shuffle=False)) == identity


def test_a_missing_file_is_named(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=r"no file matches it"):
        data_fingerprint(config(tmp_path))
