"""Reads prompts with their right continuations, and texts to compare with them.

References are JSON lines, one object per text:

    {"prompt": "The capital of France is", "reference": "Paris."}
    {"prompt": "Translate: Guten Tag", "reference": ["Good day", "Hello"]}

Predictions are JSON lines with a field "text", as `experiments.generate --json` writes them, one
for each reference in the same order. Other fields are not read; blank lines are left out.
"""

import codecs
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.json_object import json_object
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.sampling import check_encodable

_REFERENCE_FORM = 'write it as {"prompt": "...", "reference": "..."}, or a list of references.'
_PREDICTION_FORM = 'write it as {"text": "..."}.'


@dataclasses.dataclass(frozen=True)
class Reference:
    """A prompt and its right continuations; the prompt is None where none is needed."""

    prompt: str | None
    texts: tuple[str, ...]


def read_references(name: str, *, needs_prompts: bool) -> list[Reference]:
    """The references of a file.

    Args:
      name: of the file.
      needs_prompts: whether each line must have a prompt.

    Raises:
      UserError: if the file cannot be used; names the line.
    """
    references = []
    for where, record in _records(name, "references", _REFERENCE_FORM):
        prompt = record.get("prompt")
        if needs_prompts and (not isinstance(prompt, str) or not prompt):
            raise UserError(
                f"{where}: 'prompt' is {prompt!r}; it must be a text, not an empty one; "
                f"{_REFERENCE_FORM}"
            )
        texts = record.get("reference")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise UserError(f"{where}: 'reference' is {texts!r}; {_REFERENCE_FORM}")
        check_encodable(where, [*texts, *([prompt] if isinstance(prompt, str) else [])])
        references.append(Reference(prompt if isinstance(prompt, str) else None, tuple(texts)))
    return references


def read_predictions(name: str, *, count: int) -> list[str]:
    """The texts of a file.

    Args:
      name: of the file.
      count: how many there must be.

    Raises:
      UserError: if the file cannot be used; names the line.
    """
    texts = []
    for where, record in _records(name, "predictions", _PREDICTION_FORM):
        text = record.get("text")
        if not isinstance(text, str):
            raise UserError(f"{where}: 'text' is {text!r}; {_PREDICTION_FORM}")
        texts.append(text)
    if len(texts) != count:
        raise UserError(
            f"--predictions={name}: has {len(texts)} texts for {count} references; write one for "
            "each, in the same order."
        )
    return texts


def _records(name: str, option: str, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line that is not blank."""
    try:
        raw = pathlib.Path(name).expanduser().read_bytes().removeprefix(codecs.BOM_UTF8)
        lines = raw.decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"--{option}={name}: cannot be read ({error.strerror}); name another file."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--{option}={name}: not UTF-8 ({error}); convert it.") from error
    is_empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        record = json_object(line, where, form)
        is_empty = False
        yield where, record
    if is_empty:
        raise UserError(f"--{option}={name}: has no text; {form}")
