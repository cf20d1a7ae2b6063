import pathlib

import pytest

from megatransformer_jax.cli.generate_options import (
    GenerateOptions,
    read_prompts,
    read_prompts_file,
)
from megatransformer_jax.config.option import UserError


def write(folder: pathlib.Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_prompts_of_the_command_line() -> None:
    assert read_prompts(GenerateOptions(model="a", prompt=("b", "c"))) == ("b", "c")
    assert read_prompts(GenerateOptions(model="a", prompt_ids=(1, 2))) == [(1, 2)]
    assert list(read_prompts(GenerateOptions(model="a", interactive=True))) == []


def test_a_text_file_has_a_prompt_per_line(tmp_path: pathlib.Path) -> None:
    name = write(tmp_path, "a.txt", "\ufeffFirst, \r\n\n  second ünd\n")
    assert read_prompts_file(name) == ["First, ", "  second ünd"]
    assert read_prompts(GenerateOptions(model="a", prompts_file=name)) == read_prompts_file(name)


def test_json_lines_have_a_field(tmp_path: pathlib.Path) -> None:
    name = write(tmp_path, "a.jsonl", '{"prompt": "a\\nb", "answer": 1}\n\n{"prompt": "c"}')
    assert read_prompts_file(name) == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "x", r"a\.csv: the name must end in \.txt .* or \.jsonl"),
        ("a.txt", " \n\n", "has no prompt"),
        ("a.txt", b"a\nb\xff\n", r"a\.txt, line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\nb\n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '"a"', r"line 1: a JSON str, not an object"),
        ("a.jsonl", '{"text": "a"}', r"line 1: no field 'prompt'; its fields: 'text'"),
        ("a.jsonl", '{"prompt": ""}', r"line 1: 'prompt' is ''; it must be a text"),
        ("a.jsonl", '\n{"prompt": [1]}', r"line 2: 'prompt' is \[1\]"),
        ("a.jsonl", '{"prompt": "\\ud800"}', r"line 1: .* is not text"),
    ],
)
def test_a_bad_file_is_an_error_with_the_line(
    tmp_path: pathlib.Path, name: str, content: str | bytes, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        read_prompts_file(write(tmp_path, name, content))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"--prompts_file=absent\.txt: cannot be read \(No such"):
        read_prompts_file("absent.txt")
