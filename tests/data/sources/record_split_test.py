"""Held-out documents, and the embedded text."""

import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sources import build_source
from megatransformer_jax.data.sources.record import hold_out


def records(source) -> list:
    return [source[index] for index in range(len(source))]


@given(st.integers(2, 300), st.floats(0.001, 0.999), st.integers(0, 2**62))
def test_every_document_is_in_exactly_one_part(size: int, fraction: float, seed: int):
    documents = [str(number) for number in range(size)]
    train, validation = (records(part) for part in hold_out(documents, fraction, seed))
    assert train
    assert validation
    assert sorted(train + validation) == sorted(documents)
    assert abs(len(validation) - fraction * size) <= 1
    assert validation == records(hold_out(documents, fraction, seed)[1])


def test_the_seed_chooses_the_documents():
    documents = [str(number) for number in range(100)]
    assert records(hold_out(documents, 0.1, 0)[1]) != records(hold_out(documents, 0.1, 1)[1])


def test_one_document_cannot_be_split(tmp_path: pathlib.Path):
    (tmp_path / "a.txt").write_text("short")
    config = DataConfig(source="text", files=(str(tmp_path / "a.txt"),))
    with pytest.raises(UserError, match=r"data.validation_fraction: 0.05 of a corpus of one"):
        build_source(config, "train")


def test_embedded_text_is_english_and_split():
    train, validation = (build_source(DataConfig(), split) for split in ("train", "validation"))
    assert len(train) > 50
    assert len(validation) >= 3
    assert not set(records(train)) & set(records(validation))
    assert sum(map(len, records(train))) > 300_000
    assert any(" the " in text for text in records(validation))
