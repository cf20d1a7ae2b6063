"""File sources: what they read, and what they say when they cannot."""

import json
import pathlib
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sources import BadRecord, BadRecordError, build_source, training_texts
from megatransformer_jax.data.sources import files as text_file_module
from megatransformer_jax.data.sources import record as record_module
from megatransformer_jax.data.sources.files import ParquetFile, TextFile

TEXTS = [f"document {number} über 汉字 😀" for number in range(7)]


def write(path: pathlib.Path, texts: list[str]) -> None:
    """The texts in the format that the file's ending names."""
    match path.suffix:
        case ".jsonl":
            path.write_text("\n\n".join(json.dumps({"id": 1, "text": text}) for text in texts))
        case ".parquet":
            table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
            pyarrow.parquet.write_table(table, path, row_group_size=3)
        case ".arrayrecord":
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for text in texts:
                writer.write(text.encode())
            writer.close()


def config(source: str, path: pathlib.Path, **changes) -> DataConfig:
    return DataConfig(source=source, files=(str(path),), **changes)


def all_records(source) -> list:
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrayrecord"])
def test_files_of_a_pattern_give_their_records_in_order(kind: str, tmp_path: pathlib.Path):
    write(tmp_path / f"a.{kind}", TEXTS)
    write(tmp_path / f"b.{kind}", TEXTS[::-1])
    write(tmp_path / f"held.{kind}", ["held out"])
    held = (str(tmp_path / f"held.{kind}"),)
    settings = config(kind, tmp_path / f"[ab].{kind}", validation_files=held)
    assert all_records(build_source(settings, "train")) == TEXTS + TEXTS[::-1]
    assert all_records(build_source(settings, "validation")) == ["held out"]


@given(st.lists(st.sampled_from(["word ", "\n", "\n\n", "\r\n\r\n", "x" * 50, "汉" * 30, "é"])))
def test_documents_of_a_text_file_are_the_file(tmp_path_factory, parts: list[str]):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes("".join(parts).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_file_module, "MINIMUM_BYTES", 20)
        patch.setattr(text_file_module, "MAXIMUM_BYTES", 60)
        documents = all_records(TextFile(str(path)))
    assert "".join(documents) == "".join(parts)
    assert all(0 < len(document.encode()) <= 60 for document in documents)


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path: pathlib.Path):
    paragraph = "All work and no play.\n" * 40 + "\n"
    (tmp_path / "a.txt").write_text(paragraph * 100)
    documents = all_records(TextFile(str(tmp_path / "a.txt")))
    assert len(documents) > 3
    assert all(document.endswith("play.\n\n") for document in documents)


BAD_LINES = {
    '{"text": "cut off': "line 3: not valid JSON",
    '{"body": "x"}': "line 3: no field 'text'; its fields: 'body'",
    '{"text": 5}': "line 3: field 'text' is int, not text",
    '["text"]': "line 3: a JSON list, not an object",
    '{"text": "\\ud800"}': "line 3: field 'text' has a lone surrogate",
    b'{"text": "caf\xe9"}': "line 3: byte 0xe9 at offset 13 is not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_or_skipped(line: str | bytes, tmp_path: pathlib.Path, caplog):
    raw = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good + b"\n" + raw + b"\n" + good)
    held = tmp_path / "held.jsonl"
    held.write_bytes(good)
    settings = {"validation_files": (str(held),)}
    with pytest.raises(BadRecordError) as error:
        list(training_texts(config("jsonl", path, **settings)))
    assert f"{path}, {BAD_LINES[line]}" in str(error.value)
    assert "data.on_bad_record='skip'" in str(error.value)
    skipping = config("jsonl", path, on_bad_record="skip", **settings)
    assert list(training_texts(skipping)) == ["good", "good"]
    assert f"1 bad records skipped; the first: {path}, line 3" in caplog.text


def test_text_that_is_not_utf8_is_named(tmp_path: pathlib.Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    record = TextFile(str(path))[0]
    assert isinstance(record, BadRecord)
    assert "a.txt, bytes 0 to 4: byte 0xe9 at offset 3 is not UTF-8" in str(record)


def test_a_null_in_a_column_is_a_bad_record(tmp_path: pathlib.Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    held = {"validation_files": (str(path),)}
    with pytest.raises(BadRecordError, match=r"a.parquet, row 1: field 'text' is NoneType"):
        list(training_texts(config("parquet", path, **held)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", r"data.files: '.*missing.jsonl': there is no such file"),
        ("missing*.jsonl", r"data.files: '.*missing\*.jsonl': no file matches it"),
        ("", r"data.files: '.*' is a folder; name the files in it"),
    ],
)
def test_a_path_without_a_file_is_an_error(name: str, message: str, tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=message):
        build_source(config("jsonl", tmp_path / name), "train")


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "arrayrecord"])
def test_an_empty_corpus_is_an_error(kind: str, tmp_path: pathlib.Path):
    path = tmp_path / f"a.{kind}"
    path.touch()
    write(path, [])
    with pytest.raises(UserError, match=r"the train corpus is empty: .*a\."):
        build_source(config(kind, path), "train")


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord"])
def test_a_file_of_another_format_is_an_error(kind: str, tmp_path: pathlib.Path):
    path = tmp_path / "a.txt"
    path.write_text("plain text, long enough to hold what a footer would. " * 5000)
    with pytest.raises(UserError, match=r"a.txt: not a readable"):
        build_source(config(kind, path), "train")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("body", "no column 'body'; its columns: 'text', 'n'"),
        ("n", "column 'n' is int64, not text"),
    ],
)
def test_a_wrong_column_is_an_error(column: str, message: str, tmp_path: pathlib.Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "n": [1]}), path)
    with pytest.raises(UserError, match=message):
        build_source(config("parquet", path, text_field=column), "train")


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: pathlib.Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "held.jsonl").write_bytes(b"\xef\xbb\xbf\n" + b'{"text": "held"}\n')
    settings = config("jsonl", path, validation_files=(str(tmp_path / "held.jsonl"),))
    assert all_records(build_source(settings, "train")) == ["a", "b"]
    assert all_records(build_source(settings, "validation")) == ["held"]


def bad_records_of(kind: str, path: pathlib.Path) -> list[BadRecord]:
    held = {"validation_files": (str(path),)}
    source = build_source(config(kind, path, **held), "train")
    bad = [record for record in all_records(source) if isinstance(record, BadRecord)]
    with pytest.raises(BadRecordError, match=rf"a\.{kind}, "):
        list(training_texts(config(kind, path, **held)))
    assert 0 < len(bad) < len(source)
    skipping = config(kind, path, on_bad_record="skip", **held)
    assert len(list(training_texts(skipping))) == len(source) - len(bad)
    return bad


def corrupt(path: pathlib.Path, start: int, end: int) -> None:
    content = bytearray(path.read_bytes())
    for place in range(start, end):
        content[place] ^= 0xFF
    path.write_bytes(content)


def test_a_corrupt_parquet_page_is_a_bad_record(tmp_path: pathlib.Path):
    path = tmp_path / "a.parquet"
    write(path, TEXTS)
    with pyarrow.parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    corrupt(path, start, start + column.total_compressed_size)
    bad = bad_records_of("parquet", path)
    assert len(bad) == 3
    assert "a.parquet, row 0: row group 0 cannot be decoded (" in str(bad[0])


def test_a_corrupt_arrayrecord_chunk_is_a_bad_record(tmp_path: pathlib.Path):
    path = tmp_path / "a.arrayrecord"
    rng = np.random.default_rng(0)
    write(path, ["".join(map(chr, rng.integers(33, 126, 3000))) for _ in range(50)])
    corrupt(path, 70_000, 70_100)
    bad = bad_records_of("arrayrecord", path)
    assert "its chunk cannot be read (" in str(bad[0])


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_file_that_may_not_be_read_is_named(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.txt"
    path.write_text('{"text": "a"}')

    def refuse(*unused):  # Root may read everything, so permissions alone would test nothing.
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record_module, "open", refuse, raising=False)
    with pytest.raises(UserError, match=r"a.txt: cannot be read \(Permission denied\)"):
        build_source(config(kind, path), "train")


def test_a_parquet_file_that_may_not_be_read_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.parquet"
    write(path, TEXTS)

    def refuse(*unused):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuse)
    with pytest.raises(UserError, match=r"a.parquet: cannot be read \(Permission denied\)"):
        build_source(config("parquet", path), "train")


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"Parquet files: pyarrow .*\[parquet\]"):
        ParquetFile(str(tmp_path / "a.parquet"), "text")
