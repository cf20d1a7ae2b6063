"""Synonyms keep case, replace whole words only, and bad files name their line."""

import pathlib

import numpy as np
import pytest

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.augmentation.text import Synonyms, read_synonyms


def always(text: str, table: dict[str, tuple[str, ...]]) -> str:
    return Synonyms(table).replace(text, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("big dog, bigger BIG Big.", "huge dog, bigger HUGE Huge."),
        ("big-hearted big's big_x bigöl", "big-hearted big's big_x bigöl".replace("big_", "huge_")),
        ("«big»\tbig\n big", "«huge»\thuge\n huge"),
        ("nothing here", "nothing here"),
    ],
)
def test_whole_words_keep_their_case_and_the_rest_stays(text: str, expected: str):
    assert always(text, {"big": ("huge",)}) == expected


def test_a_word_in_one_letter_is_capitalised_and_not_in_capitals():
    assert always("I a", {"i": ("one self",), "a": ("any",)}) == "One self any"


def test_words_with_apostrophe_or_hyphen_are_one_word():
    table = {"don't": ("do not",), "well-known": ("famous",)}
    assert always("Don't trust well-known", table) == "Do not trust famous"


def test_every_synonym_is_chosen():
    table = {"big": ("huge", "large", "great")}
    words = Synonyms(table).replace("big " * 300, 1.0, np.random.default_rng(0)).split()
    # Chance of a count outside 60 .. 140 for 300 draws of 1/3: below 1e-5.
    assert all(60 < words.count(word) < 140 for word in table["big"])


def test_a_file_is_read(tmp_path: pathlib.Path):
    path = tmp_path / "words.tsv"
    path.write_text("\ufeff# comment\nBig\thuge, very large\r\n\nfast\tquick\n", encoding="utf-8")
    assert read_synonyms(str(path)).table == {"big": ("huge", "very large"), "fast": ("quick",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"big\thuge\nfast quick\n", "line 2: 'fast quick' is not one word"),
        (b"big\n", "line 1: 'big' has an empty synonym"),
        (b"big\thuge,,large\n", "line 1: 'big' has an empty synonym"),
        (b"big\thuge\nBIG\tlarge\n", "line 2: 'BIG' is there twice"),
        (b"# nothing\n", "holds no word"),
        (b"b\xefg\thuge", "is not UTF-8"),
    ],
)
def test_a_bad_file_is_an_error(tmp_path: pathlib.Path, content: bytes, message: str):
    path = tmp_path / "words.tsv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_synonyms(str(path))
    assert caught.value.path == "data.augmentation.synonyms_file"


def test_a_missing_file_is_an_error(tmp_path: pathlib.Path):
    with pytest.raises(ConfigError, match="No such file"):
        read_synonyms(str(tmp_path / "none.tsv"))
