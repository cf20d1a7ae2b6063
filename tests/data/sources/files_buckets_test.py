"""File sources in buckets: the same records as of files of this machine."""

import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.fingerprint import data_fingerprint
from megatransformer_jax.data.sources import build_source
from megatransformer_jax.data.sources import files as file_formats
from megatransformer_jax.failures import NoAnswer
from megatransformer_jax.storage import as_path, write_atomically

# Texts of many lengths, with cuts of each kind.
TEXTS = [f"{number} über 汉字 😀\n" * (number * 400) + "\n" for number in range(1, 6)]


def files(kind: str, folder: pathlib.Path) -> dict[str, bytes]:
    """Two files of a format."""
    match kind:
        case "text":
            # The second one has nowhere to be cut but between characters.
            return {"a.text": "\n".join(TEXTS).encode(), "b.text": ("x汉" * 40_000).encode()}
        case "jsonl":
            lines = ["\ufeff" + json.dumps({"text": TEXTS[0]}), "", '{"text": "b"}']
            return {"a.jsonl": "\n".join(lines).encode(), "b.jsonl": b'{"text": "c"}\n'}
    for name in "ab":
        table = pyarrow.table({"text": pyarrow.array([name + text for text in TEXTS])})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=2)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config(kind: str, pattern: str) -> DataConfig:
    return DataConfig(source=kind, files=(pattern,), validation_files=(pattern,))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_records_are_those_of_files_of_this_machine(scheme, kind, tmp_path, request):
    bucket = request.getfixturevalue(f"{scheme}_bucket")
    folder = f"{bucket.url}/files_buckets_test/{kind}"
    for name, content in files(kind, tmp_path).items():
        (tmp_path / name).write_bytes(content)
        write_atomically(f"{folder}/{name}", content)
    here = build_source(config(kind, f"{tmp_path}/*.{kind}"), "train")
    there = build_source(config(kind, f"{folder}/[ab].{kind}"), "train")
    assert len(there) == len(here) > 2
    before = len(bucket.requests())
    for index in range(len(here)):
        assert there[index] == here[index]
    if kind != "parquet":
        # One request for a record.
        assert len(bucket.requests()) - before == len(here)


def test_the_fingerprint_reads_no_object_and_sees_another_content(gs_bucket):
    file = f"{gs_bucket.url}/files_buckets_test/seen.jsonl"
    settings = config("jsonl", file)
    found = []
    for text in ("a", "b", "a"):
        write_atomically(file, json.dumps({"text": text}))
        before = len(gs_bucket.requests())
        found.append(data_fingerprint(settings))
        assert not any("alt=media" in line for line in gs_bucket.requests()[before:])
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("not_there.jsonl", "nothing in the bucket has this name"),
        ("*.nothing", "nothing in the bucket has this name"),
        ("folder", r"is a folder; name the files in it, e.g. gs://bucket/.*/folder/\*"),
    ],
)
def test_names_of_nothing_are_told(gs_bucket, name, problem):
    folder = f"{gs_bucket.url}/files_buckets_test/names"
    write_atomically(f"{folder}/folder/a.jsonl", "{}")
    with pytest.raises(ConfigError, match=f"data.files: .*{problem}"):
        build_source(config("jsonl", f"{folder}/{name}"), "train")


def test_an_object_that_is_gone_is_told(gs_bucket):
    file = f"{gs_bucket.url}/files_buckets_test/gone.jsonl"
    write_atomically(file, '{"text": "a"}')
    source = build_source(config("jsonl", file), "train")
    as_path("a", file).unlink()
    with pytest.raises(UserError, match=r"gone.jsonl: cannot be read"):
        source[0]


@pytest.mark.parametrize("reading", ["_read_group", "_open_parquet"])
def test_a_bucket_that_does_not_answer_makes_no_bad_record(
    reading, gs_bucket, tmp_path, monkeypatch
):
    def refused(*_):
        raise ConnectionRefusedError(111, "Connection refused")

    file = f"{gs_bucket.url}/files_buckets_test/silent.parquet"
    write_atomically(file, files("parquet", tmp_path)["a.parquet"])
    settings = config("parquet", file)
    source = build_source(settings, "train")
    monkeypatch.setattr(file_formats, reading, refused)
    with pytest.raises(NoAnswer, match=r"silent.parquet cannot be reached"):
        source[0] if reading == "_read_group" else build_source(settings, "train")
