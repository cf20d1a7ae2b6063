"""The text of `python -m experiments.evaluate --help`."""

import textwrap
from collections.abc import Mapping

from experiments.evaluate_flags import OF_GENERATION, OWN_OPTIONS
from experiments.flags import described
from megatransformer_jax.config.option import Option

_WIDTH = 100

_EXAMPLES = """\
Examples:
  python -m experiments.evaluate --from=runs/recurrent --step=best --depths=1,2,4,8
  python -m experiments.evaluate --from=my/huginn --data=my/book.txt --depths=8,32
  python -m experiments.evaluate --from=runs/recurrent --references=my/references.jsonl \\
      --max_new_tokens=32 --stop="['\\n']"
  python -m experiments.evaluate --references=my/references.jsonl --predictions=my/texts.jsonl
  python -m experiments.evaluate --from=runs/image --depths=4 --media_per_class=50

A line of references is {"prompt": "...", "reference": "..."}, or a list of several references. A
line of predictions is {"text": "..."}, as experiments.generate --json writes it.
Values are written as --name=VALUE; items of a tuple are separated by commas. An option that would
have no effect is an error."""


def help_text(doc: str) -> str:
    """All options of the command below its description."""
    generation = "Generation, with --references (greedy unless --strategy says otherwise):\n"
    parts = [doc.strip(), _EXAMPLES, "The command:\n" + _lines(OWN_OPTIONS)]
    return "\n\n".join([*parts, generation + _lines(OF_GENERATION)])


def _lines(options: Mapping[str, Option]) -> str:
    lines = [line for name, option in options.items() for line in described(option, name)]
    return "\n".join(_wrapped(line) for line in lines)


def _wrapped(line: str) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(line, _WIDTH, subsequent_indent=indent, break_on_hyphens=False)
