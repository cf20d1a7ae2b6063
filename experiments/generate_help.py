"""The text of `python -m experiments.generate --help`: every option in groups, and examples."""

import textwrap
from collections.abc import Iterator

from experiments.flags import described
from experiments.generate_flags import CommandOptions
from megatransformer_jax.config.generation import GenerationConfig, flag_name
from megatransformer_jax.config.option import Option, options_of, section_rules, sections_of

_WIDTH = 100

_EXAMPLES = """\
Examples:
  python -m experiments.generate --workdir=runs/recurrent --prompt="The old house"
  python -m experiments.generate --workdir=runs/recurrent --prompt="The old house" \\
      --temperature=0.7 --top_p=0.9 --num_samples=3 --stop="['.', '\\n']"
  python -m experiments.generate --workdir=runs/recurrent --prompt="The old house" \\
      --depth=32 --exit_criterion=kl --show_depth
  python -m experiments.generate --workdir=runs/recurrent --interactive --strategy=greedy
  python -m experiments.generate --workdir=my/huginn --prompts_file=my/prompts.jsonl \\
      --strategy=beam --num_beams=4 --json=completions.jsonl
  python -m experiments.generate --workdir=runs/image --prompt="a handwritten three" --draw \\
      --num_samples=4 --guidance_scale=2 --output=drawn
  python -m experiments.generate --workdir=runs/image --image=my/three.png --strategy=greedy

Values are written as --name=VALUE; a switch as --name or --noname. Items of a tuple are separated
by commas; items that hold commas, or \\n for a new line, need a Python list, as in the example.
None unsets what may be None. An option that would have no effect is an error."""


def help_text(doc: str) -> str:
    """All options of the command below its description."""
    parts = [doc.strip(), _EXAMPLES, "The command:\n" + _lines(options_of(CommandOptions))]
    options = list(options_of(GenerationConfig))
    parts.append("Generation:\n" + _lines(_of_section(options, "")))
    rules = section_rules(GenerationConfig)
    for path, owner, meaning in sections_of(GenerationConfig):
        notes = [(owner.__doc__ or meaning).strip(), *rules.get(path, ())]
        title = textwrap.fill(" ".join([f"{path.capitalize()}:", *" ".join(notes).split()]), _WIDTH)
        parts.append(f"{title}\n{_lines(_of_section(options, path))}")
    return "\n\n".join(parts)


def _of_section(options: list[Option], path: str) -> Iterator[Option]:
    return (option for option in options if option.path.rpartition(".")[0] == path)


def _lines(options: Iterator[Option]) -> str:
    lines = [line for option in options for line in described(option, flag_name(option.path))]
    return "\n".join(_wrapped(line) for line in lines)


def _wrapped(line: str) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(line, _WIDTH, subsequent_indent=indent, break_on_hyphens=False)
