"""Writes docs/options.md, the page of all options.

Command: python -m megatransformer_jax.config.options_page [docs/options.md]
"""

import pathlib
import sys
from collections.abc import Iterable

from megatransformer_jax.config.option import type_name
from megatransformer_jax.config.presets import preset_names
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.schema import Option, options_of, section_rules, sections_of

_HEADER = """\
# Options

<!-- Made by `python -m megatransformer_jax.config.options_page`; do not edit. -->

Every option of a run. Set one on the command line as `--config.PATH=VALUE`, in a Python experiment
or a YAML or JSON file by its nested name. What is given later wins: default, preset, experiment
file, command line. Unknown names, wrong types and values that break a check are errors.

On the command line, `None` unsets an option that allows it. Items of a tuple are separated by
commas (`--config.evaluation.final_depths=1,2,4`); items that hold commas need a Python list
(`--config.samples.prompts="['Yes, ', 'No, ']"`). Whole numbers are written
in full: `1000`, not `1e3`.

Presets (`--config.preset=NAME`): {presets}.
"""

_TABLE = "| Option | Type | Default | Meaning | Check |\n| --- | --- | --- | --- | --- |"


def options_page() -> str:
    """The page as Markdown."""
    options = list(options_of(RunConfig))
    parts = [_HEADER.format(presets=", ".join(f"`{name}`" for name in preset_names()))]
    parts.append(_section("The run", "", [], options))
    rules = section_rules(RunConfig)
    for path, section_class, meaning in sections_of(RunConfig):
        doc = " ".join((section_class.__doc__ or meaning).split())
        notes = [doc, *(f"The whole section: {rule}" for rule in rules.get(path, []))]
        parts.append(_section(f"`{path}`", path, notes, options))
    return "\n".join(parts)


def _section(title: str, path: str, notes: list[str], options: Iterable[Option]) -> str:
    rows = [_row(option) for option in options if option.path.rpartition(".")[0] == path]
    return "\n".join([f"## {title}\n", *(f"{note}\n" for note in notes), _TABLE, *rows, ""])


def _row(option: Option) -> str:
    check = option.check.describe()
    checks = [f"{check[0].upper()}{check[1:]}."] if check else []
    checks += option.rules
    cells = (
        f"`{option.path}`",
        type_name(option.declared),
        f"`{option.default!r}`",
        option.meaning,
        " ".join(checks),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    page = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "docs/options.md")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(options_page(), encoding="utf-8")
    print(f"wrote {page}")
