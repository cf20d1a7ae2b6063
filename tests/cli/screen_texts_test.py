"""What a command shows and writes."""

import io
import json
import pathlib
import re
from typing import Any

import pytest
from rich.console import Console
from small_generator import SmallGenerator

from megatransformer_jax.cli.flags import parse
from megatransformer_jax.cli.generate import COMMAND, check_json_path
from megatransformer_jax.cli.generate_options import read_prompts
from megatransformer_jax.cli.screen import Screen, Stopwatch, continue_prompts, stream, summary
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.tokenizer import BytesTokenizer


def run(
    *words: str, has_tokenizer: bool = True, depth: int | None = None, prompts: Any = None
) -> str:
    """What stdout has."""
    parsed = parse(COMMAND, ["--model=a", *words])
    file = io.StringIO()
    generator = SmallGenerator(parsed.generation)
    tokenizer = BytesTokenizer() if has_tokenizer else None
    prompts = read_prompts(parsed.options) if prompts is None else prompts
    screen = Screen(Console(file=file), depth)
    continue_prompts(generator, tokenizer, prompts, parsed, screen, Stopwatch())
    return file.getvalue()


def test_one_text_is_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt=abc") == "abccba\n"
    assert re.fullmatch(
        r"3 tokens in 0\.\d\d s \([\d.]+ tokens/s\), the first after 0\.\d\d\d s, "
        r"mean depth 2\.00\n",
        capsys.readouterr().err,
    )


def test_several_texts_have_headings(capsys: pytest.CaptureFixture[str]) -> None:
    text = run("--prompt=ab", "--prompt=c", "--num_samples=2")
    assert text == (
        "--- prompt 1, text 1: length, score -1.50 ---\nabba\n"
        "--- prompt 1, text 2: length, score -1.50 ---\nabba\n"
        "--- prompt 2, text 1: length, score -1.50 ---\ncc\n"
        "--- prompt 2, text 2: length, score -1.50 ---\ncc\n"
    )
    line = capsys.readouterr().err
    assert line.startswith("6 tokens in ")
    assert "first" not in line


def test_beams_are_not_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt=ab", "--strategy=beam") == "abba\n"
    assert "first" not in capsys.readouterr().err


def test_depth_stands_with_each_token_and_its_mean_at_the_end() -> None:
    expected = "abb[1]a[2]\niterations: mean 1.50 of 8\n"
    assert run("--prompt=ab", depth=8) == expected
    assert run("--prompt=ab", "--strategy=beam", depth=8) == expected


def test_ids_are_shown_as_text_or_as_they_are() -> None:
    ids = ",".join(map(str, BytesTokenizer().encode("ab")))
    assert run(f"--prompt_ids={ids}") == "abba\n"
    assert run("--prompt_ids=7,8", has_tokenizer=False) == "7 8 8 7\n"
    assert run("--prompt_ids=7,8", "--num_samples=2", has_tokenizer=False).count("7 8 8 7\n") == 2


def test_an_answer_in_a_chat_stands_alone() -> None:
    ids = [BytesTokenizer().encode("ab")]
    assert run("--prompt=ab", "--chat", prompts=ids) == "ba\n"
    assert run("--prompt=ab", "--chat", "--num_samples=2", prompts=ids).count("\nba\n") == 2


def test_json_lines_have_everything(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    run("--prompt=é", "--num_samples=2", f"--json={path}")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first = {
        "prompt": "é",
        "prompt_ids": None,
        "sample": 0,
        "text": "\ufffd\ufffd",
        "token_ids": [172, 198],
        "depths": [1, 2],
        "score": -1.5,
        "finish_reason": "length",
    }
    assert lines == [first, first | {"sample": 1}]
    run("--prompt_ids=100", f"--json={path}")
    again = json.loads(path.read_text())
    assert (again["prompt"], again["prompt_ids"], again["token_ids"]) == (None, [100], [100])


def test_a_file_that_cannot_be_written_is_known_before(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"--json=.*absent/a: folder .* does not exist"):
        check_json_path(str(tmp_path / "absent" / "a"))
    with pytest.raises(UserError, match="is a folder"):
        check_json_path(str(tmp_path))
    check_json_path(str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        run("--prompt=a", f"--json={tmp_path}")


def test_ctrl_c_ends_the_line() -> None:
    class Interrupted(SmallGenerator):
        def stream(self, prompt):
            yield from list(super().stream(prompt))[:2]
            raise KeyboardInterrupt

    file = io.StringIO()
    screen = Screen(Console(file=file), None)
    config = GenerationConfig()
    with pytest.raises(KeyboardInterrupt):
        stream(Interrupted(config), "abc", True, screen, Stopwatch())
    assert file.getvalue() == "cb\n"


def test_the_summary_tells_compilation_apart() -> None:
    assert summary([4, 8], 0.5, 0.25, 2.0) == (
        "2 tokens in 0.50 s (4.0 tokens/s), the first after 0.250 s, mean depth 6.00, "
        "compilation took 2.0 s more"
    )
    assert summary([8], 0.5, None, 0.0) == "1 tokens in 0.50 s (2.0 tokens/s), mean depth 8.00"
    assert summary([], 0.5, None, 1.0) == "no token in 0.50 s"
