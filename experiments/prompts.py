"""Reads the prompts that a command line names, and checks them before a model is loaded."""

import codecs
import pathlib
from collections.abc import Sequence

from experiments.generate_flags import CommandOptions
from experiments.json_object import json_object
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.sampling import check_encodable

# Texts, or lists of token ids.
Prompts = Sequence[str] | Sequence[Sequence[int]]


def read_prompts(options: CommandOptions) -> Prompts:
    """The prompts of a command; none if it is interactive.

    Raises:
      UserError: if a file cannot be used; names the line.
    """
    if options.prompts_file is not None:
        return read_prompts_file(options.prompts_file)
    return [options.prompt_ids] if options.prompt_ids else options.prompt


def read_prompts_file(name: str) -> list[str]:
    """One prompt per line of a .txt file, or per JSON object of a .jsonl file.

    Blank lines are left out, as is a byte order mark. Other fields of an object are not read.

    Raises:
      UserError: for another extension, an unreadable file, a bad line, or no prompt at all.
    """
    path = pathlib.Path(name).expanduser()
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"--prompts_file={name}: the name must end in .txt (a prompt per line) or .jsonl "
            '({"prompt": "..."} per line), so that it is known how to read it.'
        )
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise UserError(
            f"--prompts_file={name}: cannot be read ({error.strerror}); name another file."
        ) from error
    prompts = []
    for number, raw in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        line = _decoded(raw, where)
        if line.strip():
            prompts.append(line if path.suffix == ".txt" else _prompt_of(line, where))
    if not prompts:
        raise UserError(f"--prompts_file={name}: has no prompt; write one per line.")
    return prompts


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte 0x{raw[error.start]:02x} is not UTF-8; convert the file, for example "
            "with `iconv -f latin1 -t utf-8`."
        ) from error


def _prompt_of(line: str, where: str) -> str:
    form = 'write it as {"prompt": "..."}.'
    record = json_object(line, where, form)
    if "prompt" not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where}: no field 'prompt'; its fields: {fields}; {form}")
    prompt = record["prompt"]
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f"{where}: 'prompt' is {prompt!r}; it must be a text, not an empty one.")
    check_encodable(where, (prompt,))
    return prompt
