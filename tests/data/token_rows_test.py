"""Prepared rows: a row survives its record, and batches do not depend on the processes."""

import dataclasses
import itertools
import json
import pickle

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_rows import TOKENIZER, prepare_texts, texts_config, tokens_config

from megatransformer_jax.config.data import AugmentationConfig, DataConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.batches import Share
from megatransformer_jax.data.fingerprint import data_fingerprint
from megatransformer_jax.data.packing import PackedRows, PaddedRows, Row, SpecialIds
from megatransformer_jax.data.pipeline import build_pipeline, validation_batches
from megatransformer_jax.data.token_rows import (
    RowCodec,
    TokenBatches,
    read_prepared,
    training_order,
    validation_order,
)
from megatransformer_jax.types import Batch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prepared folders of several files each, and the configurations of their texts."""
    place = tmp_path_factory.mktemp("prepared")
    found = []
    for name, count in (("first", 60), ("second", 25)):
        config = texts_config(place, name, count)
        prepare_texts(config, place / name)
        found.append((config, place / name))
    return found


@pytest.fixture
def config(folders) -> DataConfig:
    """Of a run on the first folder."""
    return tokens_config(*folders[0])


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    for left, right in zip(one, other, strict=True):
        for left_part, right_part in zip(left[:-1], right[:-1], strict=True):
            np.testing.assert_array_equal(left_part, right_part)
            assert left_part.dtype == right_part.dtype


def train(config: DataConfig, count: int, state: dict | None = None, **share) -> list[Batch]:
    with build_pipeline(config, TOKENIZER, split="train", **share) as batches:
        if state is not None:
            batches.set_state(state)
        return list(itertools.islice(batches, count))


def by_processes(process_count: int, make) -> list[Batch]:
    """The global batches of processes, which `make` makes of their shares."""
    shares = [
        make(process_index=index, process_count=process_count) for index in range(process_count)
    ]
    return [
        Batch(*(np.concatenate(parts) for parts in list(zip(*batches, strict=True))[:-1]))
        for batches in zip(*shares, strict=True)
    ]


@settings(max_examples=40)
@given(
    documents=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    length=st.integers(1, 20),
    vocab_size=st.sampled_from([259, 1 << 16, (1 << 16) + 1, 200_000]),
    make_rows=st.sampled_from([PackedRows, PaddedRows]),
)
def test_a_row_comes_back_from_its_record(documents, length, vocab_size, make_rows):
    ids = SpecialIds(0, 1, 2)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(3, vocab_size, size).astype(np.int32) for size in documents]
    codec = RowCodec(length, vocab_size, ids)
    for row in make_rows(lambda start: iter(tokens[start:]), ids, length):
        record = codec.encode(row)
        batch = codec.empty_batch(2)
        codec.decode(record, batch, 1)
        for part, empty, back in zip(row, Row.empty(length, 0), batch[:-1], strict=True):
            np.testing.assert_array_equal(back, np.stack([empty, part]))
            assert part.dtype == back.dtype
        id_bytes = 2 if vocab_size <= 1 << 16 else 4
        filled, segments = (row.segment_ids > 0).sum(), row.segment_ids.max()
        assert len(record) == 4 * (segments + 1) + id_bytes * (filled + 1)


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_unshuffled_rows_of_one_file_are_those_of_the_texts(packing, tmp_path):
    texts = texts_config(tmp_path, "texts", packing=packing, shuffle=False)
    prepare_texts(texts, tmp_path / "rows", shard_bytes=10**9)
    rows = tokens_config(texts, tmp_path / "rows")
    epoch = read_prepared(str(tmp_path / "rows")).num_rows("train") // 8
    assert epoch > 2
    # The texts of the next epoch would fill the last row of this one.
    assert_equal(train(rows, epoch), train(texts, epoch))
    assert_equal(validation_batches(rows, TOKENIZER), validation_batches(texts, TOKENIZER))


@pytest.mark.parametrize("mixture", [(), (0.7, 0.3)])
def test_batches_are_the_same_for_every_number_of_processes(mixture, folders):
    config = tokens_config(folders[0][0], folders[0][1], folders[1][1], mixture=mixture)
    whole = train(config, 12)
    held_out = validation_batches(config, TOKENIZER)
    # Each run stops after five batches, and another number of processes goes on.
    for process_count, later in ((2, 4), (4, 8), (8, 1)):
        first = by_processes(process_count, lambda **share: train(config, 5, **share))
        more = by_processes(later, lambda **share: train(config, 7, {"batch": 5}, **share))
        assert_equal(first + more, whole)
        shares = by_processes(
            process_count, lambda **share: validation_batches(config, TOKENIZER, **share)
        )
        assert_equal(shares, held_out)


def test_the_state_is_the_number_of_the_next_batch_in_every_process(config):
    for index in range(2):
        share = {"process_index": index, "process_count": 2}
        with build_pipeline(config, TOKENIZER, split="train", **share) as batches:
            for _ in range(3):
                next(batches)
            assert batches.get_state() == {"batch": 3}


@pytest.mark.parametrize("weights", [(0.7, 0.3), (5.0, 1.0, 2.5), (1.0, 0.015)])
def test_a_mixture_has_its_weights(weights):
    sizes = [5000, 1200, 2000][: len(weights)]
    files = tuple("abc"[: len(weights)])
    config = DataConfig(source="tokens", files=files, mixture=weights)
    order = training_order(config, sizes)
    numbers = np.array([int(order[index]) for index in range(10_000)])
    owners = np.searchsorted(np.cumsum(sizes), numbers, side="right")
    for folder, weight in enumerate(weights):
        share = (owners == folder).mean()
        assert share == pytest.approx(weight / sum(weights), rel=0.01)
        # Every row of a folder is visited once per epoch of the folder.
        own = numbers[owners == folder]
        epochs = own[: len(own) // sizes[folder] * sizes[folder]].reshape(-1, sizes[folder])
        for epoch in epochs:
            assert len(set(epoch)) == sizes[folder]


def test_a_process_reads_the_records_of_its_rows_only(config, monkeypatch):
    read: list[int] = []
    original = grain.sources.ArrayRecordDataSource.__getitem__

    def counted(self, key):
        read.append(int(key))
        return original(self, key)

    monkeypatch.setattr(grain.sources.ArrayRecordDataSource, "__getitem__", counted)
    train(config, 4)
    everything = list(read)
    assert len(everything) == 4 * 8
    shares = []
    for index in range(4):
        read.clear()
        train(config, 4, process_index=index, process_count=4)
        assert len(read) == 4 * 2
        shares.append(list(read))
    together = [
        number
        for batch in range(4)
        for share in shares
        for number in share[2 * batch : 2 * batch + 2]
    ]
    assert together == everything


def test_each_epoch_visits_every_row_in_a_new_order(config, folders):
    rows = read_prepared(config.files[0]).num_rows("train")
    order = training_order(config, [rows])
    first, second = (
        [int(order[index]) for index in range(k * rows, (k + 1) * rows)] for k in (0, 1)
    )
    assert sorted(first) == sorted(second) == list(range(rows))
    assert first != second


def test_validation_interleaves_the_rows_of_all_folders():
    order = validation_order([6, 3])
    assert [int(order[index]) for index in range(9)] == [0, 6, 1, 2, 7, 3, 4, 8, 5]


def test_hidden_tokens_are_predicted_and_redrawn_each_epoch(config):
    hiding = dataclasses.replace(
        config, augmentation=AugmentationConfig(token_dropout=0.5), shuffle=False
    )
    rows = read_prepared(config.files[0]).num_rows("train")
    batches = -(-2 * rows // 8)
    shown = train(dataclasses.replace(config, shuffle=False), batches)
    hidden = train(hiding, batches)
    for plain, dropped in zip(shown, hidden, strict=True):
        for name in ("targets", "loss_mask", "segment_ids", "positions"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(dropped, name))
        changed = plain.tokens != dropped.tokens
        assert (dropped.tokens[changed] == TOKENIZER.pad_id).all()
        assert not changed[plain.tokens == TOKENIZER.bos_id].any()
    tokens = [np.concatenate([batch.tokens for batch in found]) for found in (shown, hidden)]
    is_token = (tokens[0] != TOKENIZER.pad_id) & (tokens[0] != TOKENIZER.bos_id)
    rate = (tokens[0] != tokens[1])[is_token].mean()
    assert 0.45 < rate < 0.55
    np.testing.assert_array_equal(tokens[0][:rows], tokens[0][rows : 2 * rows])
    assert (tokens[1][:rows] != tokens[1][rows : 2 * rows]).any()
    validation = validation_batches(hiding, TOKENIZER)
    assert_equal(validation, validation_batches(config, TOKENIZER))


def test_batches_pickle_for_worker_processes(config):
    stream = TokenBatches(config, TOKENIZER, "train", Share(8))
    copy = pickle.loads(pickle.dumps(stream._source))
    assert_equal([copy[0], copy[1]], train(config, 2))


# ------------------------------------------------------------------------------
# Bad input.


class OtherBytes(type(TOKENIZER)):  # type: ignore[misc]
    """The same ids under another digest."""

    def digest(self) -> str:
        return "0123456789abcdef"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 40}, r"data.sequence_length: 40, but the rows in .* with 48; set"),
        ({"packing": "pad"}, r"data.packing: 'pad', but the rows in .* were made with 'pack'"),
        ({"files": ("no/such",)}, r"data.files: 'no/such' has no tokens.json"),
    ],
)
def test_rows_of_another_configuration_are_refused(changes, message, config):
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, **changes), 1)


def test_rows_of_another_tokenizer_are_refused(config):
    with pytest.raises(UserError, match=r"another tokenizer .* \(digest .*, not 0123456789ab\)"):
        build_pipeline(config, OtherBytes(), split="train")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": (1.0,)}, "mixture: .* are 1 weights, and files names 2 folders"),
        ({"mixture": (1.0, 0.0)}, "mixture: .* each item must be above 0"),
        ({"files": ("a", "a")}, "files: .* names a folder twice"),
        ({"files": ()}, "files: is empty, but source='tokens'"),
        ({"packing": "bucket"}, "packing: 'bucket' does not go with source='tokens'"),
        ({"validation_fraction": 0.2}, "validation_fraction: 0.2 would be ignored with source="),
        ({"text_field": "body"}, "text_field: 'body' would be ignored"),
        ({"source": "text", "mixture": (1.0, 2.0)}, "mixture: .* would be ignored with source="),
        (
            {"augmentation": AugmentationConfig(synonyms_file="a.tsv", synonym_rate=0.1)},
            "augmentation.synonyms_file: 'a.tsv' would be ignored with source='tokens', whose",
        ),
    ],
)
def test_options_without_effect_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"source": "tokens", "files": ("a", "b"), **values})


def test_damaged_folders_are_refused(tmp_path):
    texts = texts_config(tmp_path, "texts")
    folder = tmp_path / "rows"
    prepare_texts(texts, folder)
    config = tokens_config(texts, folder)
    before = data_fingerprint(config)
    assert before.startswith("prepared: ") and train(config, 1)

    shard = sorted(folder.glob("rows-*"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{shard.name} has {len(content) - 1} bytes in place of"):
        train(config, 1)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} does not exist, so .* is not whole"):
        train(config, 1)
    # Bytes in the middle of a file of the right size; records have checksums.
    middle = len(content) // 2
    shard.write_bytes(content[: middle - 200] + bytes(400) + content[middle + 200 :])
    with pytest.raises(UserError, match=rf"{shard.name}: a row cannot be read \("):
        train(config, 40)

    facts = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps({**facts, "documents": 5}))
    assert data_fingerprint(config) != before
    (folder / "tokens.json").write_text(json.dumps({**facts, "format": 9}))
    with pytest.raises(UserError, match=r"the rows are of format 9, and this version .* reads 1"):
        train(config, 1)
    (folder / "tokens.json").write_text("{")
    with pytest.raises(UserError, match=r"tokens.json is not JSON"):
        train(config, 1)
