import io
import pathlib

import pytest
from rich.console import Console

from megatransformer_jax.cli.screen import Screen, color, color_ranges, token_texts
from megatransformer_jax.config.data import TokenizerConfig
from megatransformer_jax.data.tokenizer import (
    BytesTokenizer,
    SentencePieceTokenizer,
    train_sentencepiece,
)

TOKENS = [(" a", 1), ("", 2), ("é", 8), ("!", 8)]


def shown(*, depth: int | None, has_colors: bool, no_color: bool = False) -> str:
    file = io.StringIO()
    system = "standard" if has_colors else None
    console = Console(
        file=file, force_terminal=has_colors, color_system=system, no_color=no_color, width=20
    )
    screen = Screen(console, depth)
    screen.prompt("Say [bold]")
    for text, steps in TOKENS:
        screen.token(text, steps)
    screen.end()
    screen.legend()
    return file.getvalue()


def test_without_depth_the_text_is_as_it_is() -> None:
    assert shown(depth=None, has_colors=False) == "Say [bold] aé!\n"


def test_without_colors_the_number_stands_behind_each_token() -> None:
    expected = "Say [bold] a[1]é[2,8]![8]\niterations: mean 4.75 of 8\n"
    assert shown(depth=8, has_colors=False) == expected
    assert shown(depth=8, has_colors=True, no_color=True) == expected


def test_colors_go_from_few_iterations_to_many_and_have_a_legend() -> None:
    text = shown(depth=8, has_colors=True)
    blue, red = "\x1b[34m", "\x1b[31m"
    assert f"{blue} a\x1b[0m{red}é\x1b[0m{red}!\x1b[0m" in text
    assert f"iterations:{blue} 1-2\x1b[0m" in text
    assert f"{red} 8\x1b[0m, mean 4.75 of 8" in text


def test_a_model_cannot_command_the_terminal() -> None:
    file = io.StringIO()
    screen = Screen(Console(file=file, force_terminal=True, color_system="standard"), None)
    screen.token("\x1b[2J", 1)
    assert "\x1b[2J" not in file.getvalue()


def test_a_character_that_stays_incomplete_keeps_its_iterations() -> None:
    file = io.StringIO()
    screen = Screen(Console(file=file), 4)
    screen.token("", 3)
    screen.end()
    assert file.getvalue() == "[3]\n"


def test_each_legend_is_about_what_came_since_the_last() -> None:
    file = io.StringIO()
    screen = Screen(Console(file=file), 4)
    screen.legend()
    for steps in (1, 3):
        screen.token("a", steps)
        screen.legend()
    assert file.getvalue() == ("a[1]iterations: mean 1.00 of 4\na[3]iterations: mean 3.00 of 4\n")


@pytest.mark.parametrize("depth", [1, 2, 4, 5, 8, 32, 64])
def test_ranges_cover_every_depth_once(depth: int) -> None:
    ranges = list(color_ranges(depth))
    covered = [steps for first, last in ranges for steps in range(first, last + 1)]
    assert covered == list(range(1, depth + 1))
    assert len(ranges) == min(depth, 5)
    for first, last in ranges:
        assert color(first, depth) == color(last, depth)


def test_texts_of_tokens_join_to_the_text() -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode("aé€")
    assert token_texts(tokenizer, ids, "aé€") == ["a", "", "é", "", "", "€"]
    assert token_texts(tokenizer, ids, "aé") == ["a", "", "é", "", "", ""]
    assert token_texts(tokenizer, [*ids[:2], tokenizer.eos_id], "a\ufffd") == ["a", "", "\ufffd"]
    assert token_texts(tokenizer, [], "") == []


@pytest.fixture(scope="module")
def sentencepiece() -> SentencePieceTokenizer:
    config = TokenizerConfig(vocab_size=300)
    words = ["the old house stood on the hill and the rain fell on it all day long"] * 40
    return SentencePieceTokenizer(train_sentencepiece(config, words))


@pytest.mark.parametrize("drops_first_blank", [False, True])
def test_sentencepiece_texts_keep_or_drop_the_first_blank(
    sentencepiece: SentencePieceTokenizer, drops_first_blank: bool
) -> None:
    ids = sentencepiece.encode(" the rain € fell")
    text = "the rain € fell" if drops_first_blank else " the rain € fell"
    texts = token_texts(sentencepiece, ids, text)
    assert "".join(texts) == text
    assert len(texts) == len(ids)


def test_files_get_plain_text(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "out", "w", encoding="utf-8") as file:
        Screen(Console(file=file), None).token("a\rb\x1b" + "c" * 300, 1)
    assert (tmp_path / "out").read_bytes() == b"a\rb\x1b" + b"c" * 300
