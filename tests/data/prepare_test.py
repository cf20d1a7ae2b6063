"""Preparation: the same files however often it was killed and however many workers it has."""

import errno
import json
import multiprocessing
import os
import pathlib
import queue
import types

import pyarrow
import pyarrow.parquet
import pytest
from prepared_rows import TOKENIZER, prepare_texts, texts_config, tokens_config

from megatransformer_jax.config.option import TRY_AGAIN, UserError
from megatransformer_jax.data.packing import num_positions
from megatransformer_jax.data.pipeline import build_pipeline, validation_batches
from megatransformer_jax.data.prepare import _follow, hold_folder
from megatransformer_jax.data.sources.build import build_splits
from megatransformer_jax.data.sources.record import BadRecordError
from megatransformer_jax.data.token_rows import read_prepared
from megatransformer_jax.storage import write_atomically


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Stop(Exception):
    """Ends a preparation as a kill would, at a chosen document."""


def stop_after(count: int):
    left = [count]

    def report(documents: int, num_bytes: int) -> None:
        left[0] -= documents
        if left[0] < 0:
            raise Stop

    return report


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts, and the folder that one process makes of them without a stop."""
    place = tmp_path_factory.mktemp("texts")
    config = texts_config(place, "texts")
    prepare_texts(config, place / "whole")
    return config, place / "whole"


def test_the_folder_says_what_it_holds(texts):
    config, folder = texts
    facts = json.loads((folder / "tokens.json").read_text())
    assert facts["tokenizer"] == TOKENIZER.digest()
    assert facts["data.sequence_length"] == 48 and facts["data.packing"] == "pack"
    assert facts["documents"] == {"train": 54, "validation": 6}
    assert len(facts["train"]) == facts["shards"]["train"] > 3
    names = {path.name for path in folder.iterdir()} - {"tokens.json"}
    count = len(facts["train"])
    assert names == {
        *(f"rows-{number:05d}-of-{count:05d}.array_record" for number in range(count)),
        "validation-00000-of-00001.array_record",
    }
    tokens = [TOKENIZER.encode(build_splits(config)["train"][index]) for index in range(54)]
    assert sum(fact["tokens"] for fact in facts["train"]) == sum(map(len, tokens))
    positions = sum(map(num_positions, tokens))
    assert positions / 48 <= sum(fact["rows"] for fact in facts["train"]) < positions / 48 + count


def test_every_token_of_every_document_is_in_one_row(texts):
    config, folder = texts
    rows = tokens_config(config, folder, shuffle=False, batch_size=1)
    count = read_prepared(str(folder)).num_rows("train")
    with build_pipeline(rows, TOKENIZER, split="train") as batches:
        ids = [int(token) for _ in range(count) for token in next(batches).tokens[0]]
    source = build_splits(config)["train"]
    expected = "".join(source[index] for index in range(len(source)))
    assert TOKENIZER.decode(ids) == expected


def test_stopped_preparations_lose_and_double_nothing(texts, tmp_path):
    config, whole = texts
    folder = tmp_path / "rows"
    made: dict[str, int] = {}
    for documents in (0, 15, 15, 25):
        with pytest.raises(Stop):
            prepare_texts(config, folder, report=stop_after(documents))
        times = {path.name: path.stat().st_mtime_ns for path in folder.glob("rows-*.array_record")}
        assert made.items() <= times.items()  # What is finished is not made again.
        made = times
        assert not list(folder.glob(".*")) and not (folder / "tokens.json").exists()
        with pytest.raises(UserError, match="start the command again: it goes on"):
            read_prepared(str(folder))
    assert len(made) > 2
    prepare_texts(config, folder)
    assert content(folder) == content(whole)


def test_workers_make_the_same_files(texts, tmp_path):
    config, whole = texts
    folder = tmp_path / "rows"
    counted = []
    prepare_texts(config, folder, report=lambda *counts: counted.append(counts), workers=2)
    assert content(folder) == content(whole)
    assert sum(documents for documents, _ in counted) == 60
    assert not multiprocessing.active_children()


def test_a_worker_that_was_killed_is_told():
    workers = [types.SimpleNamespace(exitcode=None), types.SimpleNamespace(exitcode=-9)]
    with pytest.raises(UserError, match=r"a worker process was killed \(exit code -9") as caught:
        _follow(workers, queue.Queue(), 1, lambda documents, num_bytes: None)
    assert caught.value.exit_code == TRY_AGAIN


def test_a_whole_folder_is_left_alone_and_a_missing_file_made_again(texts, tmp_path):
    config, whole = texts
    folder = tmp_path / "rows"
    prepare_texts(config, folder)
    shard = sorted(folder.glob("rows-*"))[1]
    shard.unlink()
    told = []
    prepare_texts(config, folder, report=lambda *counts: told.append(counts))
    assert content(folder) == content(whole)
    assert 0 < len(told) < 54
    prepare_texts(config, folder, report=stop_after(0))
    assert content(folder) == content(whole)


def test_a_folder_of_other_rows_is_refused(texts, tmp_path):
    config, _ = texts
    folder = tmp_path / "rows"
    with pytest.raises(Stop):
        prepare_texts(config, folder, report=stop_after(15))
    padded = texts_config(tmp_path, "texts", packing="pad", sequence_length=32)
    for _ in range(2):  # Of a folder that is not finished, and of one that is.
        with pytest.raises(UserError, match=r"(?s)data.packing: then 'pack', now 'pad'.*: then 48"):
            prepare_texts(padded, folder)
        prepare_texts(config, folder)


@pytest.mark.parametrize("damage", ['{"shards', "[]"])
def test_a_damaged_plan_is_told_with_the_way_out(damage, texts, tmp_path):
    config, whole = texts
    folder = tmp_path / "rows"
    with pytest.raises(Stop):
        prepare_texts(config, folder, report=stop_after(15))
    (folder / "plan.json").write_text(damage, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"plan\.json is damaged: .* Delete it, then start the same"
    ):
        prepare_texts(config, folder)
    (folder / "plan.json").unlink()
    prepare_texts(config, folder)
    assert content(folder) == content(whole)


def test_bad_records_stop_it_or_are_counted(tmp_path):
    config = texts_config(tmp_path, "texts", 30)
    with open(config.files[0], "a") as file:
        file.write('{"body": "no text"}\n' * 20)
    folder = tmp_path / "rows"
    with pytest.raises(BadRecordError, match=r"texts.jsonl, line \d+: no field 'text'"):
        prepare_texts(config, folder)
    skipping = texts_config(tmp_path, "texts", 30, on_bad_record="skip")
    with open(config.files[0], "a") as file:
        file.write('{"body": "no text"}\n' * 20)
    prepare_texts(skipping, folder)
    facts = read_prepared(str(folder)).facts
    splits = (*facts["train"], *facts["validation"])
    assert sum(fact["skipped"] for fact in splits) == 20
    assert validation_batches(tokens_config(config, folder), TOKENIZER)


def test_a_corpus_without_text_is_an_error(tmp_path):
    config = texts_config(tmp_path, "texts", 0)
    (tmp_path / "texts.jsonl").write_text('{"text": ""}\n' * 5)
    with pytest.raises(UserError, match="none of the 4 training documents holds text"):
        prepare_texts(config, tmp_path / "rows")


def test_a_full_disk_is_told_in_one_line(texts, tmp_path, monkeypatch):
    config, whole = texts
    folder = tmp_path / "rows"

    def full(*unused: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Stop):
        prepare_texts(config, folder, report=stop_after(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"rows-00000.* \(No space left .*\)\. Free") as caught:
            prepare_texts(config, folder)
        assert caught.value.exit_code == TRY_AGAIN
    assert not list(folder.glob("*.array_record")) and not list(folder.glob(".*"))
    prepare_texts(config, folder)
    assert content(folder) == content(whole)


def test_two_preparations_do_not_write_to_one_folder(tmp_path):
    with (
        hold_folder(tmp_path),
        pytest.raises(UserError, match="another process is preparing data there"),
        hold_folder(tmp_path),
    ):
        pass
    with hold_folder(tmp_path):
        pass


def test_parquet_of_a_bucket_makes_the_rows_of_the_same_files_here(s3_bucket, tmp_path):
    texts = texts_config(tmp_path, "texts")
    lines = pathlib.Path(texts.files[0]).read_text().splitlines()
    table = pyarrow.table({"text": [json.loads(line)["text"] for line in lines]})
    pyarrow.parquet.write_table(table, tmp_path / "texts.parquet", row_group_size=7)
    there = f"{s3_bucket.url}/prepare_test/texts.parquet"
    write_atomically(there, (tmp_path / "texts.parquet").read_bytes())
    for name, files in (("here", str(tmp_path / "texts.parquet")), ("there", there)):
        config = texts_config(tmp_path, "texts", source="parquet", files=(files,))
        prepare_texts(config, tmp_path / name)
    rows = [
        {name: made for name, made in content(tmp_path / place).items() if name != "tokens.json"}
        for place in ("here", "there")
    ]
    assert rows[0] == rows[1] and len(rows[0]) > 3
