"""Files of references and predictions; errors name the line."""

import json

import pytest

from megatransformer_jax.config.option import UserError
from megatransformer_jax.runs.evaluate_text import Reference, read_predictions, read_references


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_references(tmp_path):
    name = write(
        tmp_path / "r.jsonl",
        '{"prompt": "a", "reference": "b"}',
        "",
        # A separator of lines in a text is not an end of a line of the file.
        json.dumps({"prompt": "c\u2028", "reference": ["d", ""], "more": 1}, ensure_ascii=False),
    )
    wanted = [Reference("a", ("b",)), Reference("c\u2028", ("d", ""))]
    assert read_references(name, needs_prompts=True) == wanted
    name = write(tmp_path / "n.jsonl", '{"reference": "b"}')
    assert read_references(name, needs_prompts=False) == [Reference(None, ("b",))]


def test_predictions(tmp_path):
    name = write(tmp_path / "p.jsonl", '{"text": "", "depth": 3}', '{"text": "b"}')
    assert read_predictions(name, count=2) == ["", "b"]
    with pytest.raises(UserError, match="has 2 texts for 3 references"):
        read_predictions(name, count=3)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: not valid JSON"),
        ("[]", "line 1: a JSON list"),
        ('{"reference": "a"}', "line 1: 'prompt' is None"),
        ('{"prompt": "", "reference": "a"}', "line 1: 'prompt' is ''"),
        ('{"prompt": "a"}', "line 1: 'reference' is None"),
        ('{"prompt": "a", "reference": []}', r"line 1: 'reference' is \[\]"),
        ('{"prompt": "a", "reference": [1]}', r"line 1: 'reference' is \[1\]"),
        ('{"prompt": "a", "reference": "\\ud800"}', "line 1: .*is not text"),
        ("", "has no text"),
    ],
)
def test_bad_references(tmp_path, line, problem):
    with pytest.raises(UserError, match=problem):
        read_references(write(tmp_path / "r.jsonl", line), needs_prompts=True)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"references: absent\.jsonl cannot be read"):
        read_references("absent.jsonl", needs_prompts=True)
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "\xe4"}\n')
    with pytest.raises(UserError, match=r"predictions: .*not UTF-8"):
        read_predictions(str(path), count=1)
    with pytest.raises(UserError, match="line 1: 'text' is None"):
        read_predictions(write(tmp_path / "p.jsonl", '{"prediction": "a"}'), count=1)
