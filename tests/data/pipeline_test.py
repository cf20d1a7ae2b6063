"""Batches: deterministic, resumable, shared by processes, the same with workers."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.config.data import DataConfig, ReasoningConfig, TokenizerConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.pipeline import build_pipeline, validation_batches
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.types import Batch

TOKENIZER = BytesTokenizer()
TEXT = DataConfig(
    tokenizer=TokenizerConfig(kind="bytes"), batch_size=4, sequence_length=1024, prefetch_batches=0
)
PADDED = dataclasses.replace(TEXT, packing="pad")
BUCKETS = dataclasses.replace(TEXT, packing="bucket", sequence_length=4096)
REASONING = DataConfig(
    source="reasoning",
    reasoning=ReasoningConfig(num_train=50, num_eval=10),
    batch_size=4,
    sequence_length=64,
    prefetch_batches=0,
)
CONFIGS = {"text": TEXT, "padded": PADDED, "buckets": BUCKETS, "reasoning": REASONING}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.media is right.media is None
        for left_part, right_part in zip(left[:-1], right[:-1], strict=True):
            np.testing.assert_array_equal(left_part, right_part)
            assert left_part.dtype == right_part.dtype


def train(config: DataConfig, count: int, **share) -> list[Batch]:
    with build_pipeline(config, TOKENIZER, split="train", **share) as batches:
        return list(itertools.islice(batches, count))


def stacked(shares: list[list[Batch]]) -> list[Batch]:
    """The global batches from those of the processes."""
    return [
        Batch(*(np.concatenate(parts) for parts in list(zip(*batches, strict=True))[:-1]))
        for batches in zip(*shares, strict=True)
    ]


@every_config
def test_batches_have_the_shapes_and_types_of_the_contract(config: DataConfig):
    (batch,) = train(config, 1)
    assert batch.media is None
    for name, part in list(batch._asdict().items())[:-1]:
        assert part.shape in config.batch_shapes
        assert part.dtype == (np.float32 if name == "loss_mask" else np.int32)


@every_config
def test_order_follows_from_the_seed(config: DataConfig):
    assert_equal(train(config, 5), train(config, 5))
    other = train(dataclasses.replace(config, seed=1), 1)
    assert (other[0].tokens != train(config, 1)[0].tokens).any()


@every_config
@pytest.mark.parametrize("ahead", [0, 3])
def test_a_pipeline_resumes_anywhere(config: DataConfig, ahead: int):
    config = dataclasses.replace(config, prefetch_batches=ahead)
    whole = train(config, 30)

    @settings(max_examples=8, deadline=None)
    @given(st.integers(0, 25))
    def resume(stop: int):
        with build_pipeline(config, TOKENIZER, split="train") as batches:
            for _ in range(stop):
                next(batches)
            state = json.loads(json.dumps(batches.get_state()))
            next(batches)
            # Back in the same pipeline, and on in a new one.
            batches.set_state(state)
            assert_equal(list(itertools.islice(batches, 3)), whole[stop : stop + 3])
        with build_pipeline(config, TOKENIZER, split="train") as batches:
            batches.set_state(state)
            assert batches.get_state() == state
            assert_equal(list(itertools.islice(batches, 3)), whole[stop : stop + 3])

    resume()


@every_config
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batches(config: DataConfig, process_count: int):
    shares = [
        train(config, 6, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    assert_equal(stacked(shares), train(config, 6))
    validation = [
        validation_batches(config, TOKENIZER, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    assert_equal(stacked(validation), validation_batches(config, TOKENIZER))


def test_the_state_is_the_same_in_every_process():
    states = []
    for index in range(2):
        with build_pipeline(
            TEXT, TOKENIZER, split="train", process_index=index, process_count=2
        ) as batches:
            for _ in range(3):
                next(batches)
            states.append(batches.get_state())
    assert states[0] == states[1]


@pytest.mark.parametrize("config", [BUCKETS, REASONING], ids=["buckets", "reasoning"])
def test_workers_do_not_change_the_batches(config: DataConfig):
    whole = train(config, 12)
    with build_pipeline(
        dataclasses.replace(config, num_workers=2, prefetch_batches=1), TOKENIZER, split="train"
    ) as batches:
        with build_pipeline(config, TOKENIZER, split="train") as alone:
            for _ in range(5):
                next(alone)
            batches.set_state(alone.get_state())
        assert_equal(list(itertools.islice(batches, 7)), whole[5:])


def test_a_worker_outlives_signals_to_the_group():
    whole = train(TEXT, 40)
    with build_pipeline(
        dataclasses.replace(TEXT, num_workers=1), TOKENIZER, split="train"
    ) as batches:
        found = [next(batches)]
        # As `timeout` or a terminal does, which signal all processes of a group.
        (worker,) = multiprocessing.active_children()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
        assert_equal([*found, *itertools.islice(batches, 39)], whole)


@every_config
def test_validation_is_one_pass_with_a_padded_end(config: DataConfig):
    batches = validation_batches(config, TOKENIZER)
    assert_equal(batches, validation_batches(config, TOKENIZER))
    assert_equal(batches[:2], validation_batches(config, TOKENIZER, num_batches=2))
    last = batches[-1]
    assert last.tokens.shape in config.batch_shapes
    assert last.loss_mask.any()
    empty = ~last.segment_ids.any(axis=1)
    assert not last.loss_mask[empty].any()


def test_ten_held_out_problems_make_two_batches_and_a_half():
    rows = [batch.segment_ids.any(axis=1).sum() for batch in validation_batches(REASONING, None)]
    assert rows == [4, 4, 2]


def texts_file(folder: pathlib.Path, texts: list[str]) -> str:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def read_texts(batches: list[Batch]) -> list[str]:
    """The documents in rows that each hold one."""
    return [TOKENIZER.decode(row.tolist()) for batch in batches for row in batch.tokens]


def test_each_epoch_visits_every_document_in_a_new_order(tmp_path: pathlib.Path):
    documents = [f"document {number}" for number in range(12)]
    path = texts_file(tmp_path, documents)
    config = dataclasses.replace(
        PADDED, source="jsonl", files=(path,), validation_files=(path,), sequence_length=20
    )
    texts = read_texts(train(config, 6))
    first, second = texts[:12], texts[12:]
    assert sorted(first) == sorted(second) == sorted(documents)
    assert first != second
    assert first != documents
    in_order = dataclasses.replace(config, shuffle=False)
    assert read_texts(train(in_order, 6)) == documents * 2
    assert read_texts(validation_batches(config, TOKENIZER)) == documents


def test_skipped_records_are_counted_once(tmp_path: pathlib.Path):
    path = texts_file(tmp_path, ["good one", "good two"])
    with open(path, "a") as file:
        file.write("broken\n")
    config = dataclasses.replace(
        PADDED, source="jsonl", files=(path,), validation_files=(path,), sequence_length=20
    )
    with (
        pytest.raises(UserError, match=r"a.jsonl, line 3: not valid JSON"),
        build_pipeline(config, TOKENIZER, split="train") as batches,
    ):
        next(batches)
    skipping = dataclasses.replace(config, on_bad_record="skip")
    with build_pipeline(skipping, TOKENIZER, split="train") as batches:
        texts = read_texts(list(itertools.islice(batches, 4)))
        assert batches.bad_records.count == 1
        assert "line 3" in str(batches.bad_records.first)
    assert sorted(texts) == ["good one"] * 8 + ["good two"] * 8


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_corpus_without_text_is_an_error_and_not_a_hang(tmp_path: pathlib.Path, ahead: int):
    path = texts_file(tmp_path, ["", "", ""])
    config = dataclasses.replace(
        TEXT, source="jsonl", files=(path,), validation_files=(path,), prefetch_batches=ahead
    )
    for split in ("train", "validation"):
        with (
            pytest.raises(UserError, match="none of the 3 documents holds text"),
            build_pipeline(config, TOKENIZER, split=split) as batches,
        ):
            next(batches)


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(UserError, match=r"data.batch_size: 4 rows .* by 3 processes"):
        build_pipeline(TEXT, TOKENIZER, split="train", process_index=0, process_count=3)


@pytest.mark.parametrize("state", [{"batch": 3}, {"document": -1, "offset": 0}, {"document": 1}])
def test_a_state_of_another_pipeline_is_an_error(state: dict):
    with (
        build_pipeline(TEXT, TOKENIZER, split="train") as batches,
        pytest.raises(UserError, match=r"does not go with this data configuration"),
    ):
        batches.set_state(state)


def test_a_closed_pipeline_says_so():
    batches = build_pipeline(TEXT, TOKENIZER, split="train")
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="the pipeline is closed"):
        next(batches)


def test_a_program_that_ends_without_closing_ends_quietly():
    program = (
        "from megatransformer_jax.config.data import DataConfig\n"
        "from megatransformer_jax.data.pipeline import build_pipeline\n"
        "batches = build_pipeline(DataConfig(source='reasoning'), None, split='train')\n"
        "next(batches)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
