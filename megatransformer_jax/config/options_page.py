"""Writes docs/options.md, the page of all options.

Command: python -m megatransformer_jax.config.options_page [docs/options.md]
"""

import pathlib
import sys
from collections.abc import Callable, Iterator

from megatransformer_jax.config.build import preset_names
from megatransformer_jax.config.generation import GenerationConfig, flag_name
from megatransformer_jax.config.option import (
    Option,
    options_of,
    section_rules,
    sections_of,
    type_name,
)
from megatransformer_jax.config.run_kinds import AllOptions
from megatransformer_jax.config.serving import (
    ChatRequestConfig,
    CompletionRequestConfig,
    ServingConfig,
)

_HEADER = """\
# Options

<!-- Made by `python -m megatransformer_jax.config.options_page`; do not edit. -->

This page lists every option of a run, followed by those of [generation](#generation), of a
[server](#serving) and of [requests](#requests-to-v1completions) to it. Set an option of a run on
the command line as `--config.PATH=VALUE`, or by its nested name in a Python experiment, a YAML file
or a JSON file. Later sources override earlier ones: default, preset, experiment file, command line.
Unknown names, wrong types and values that fail a check are errors.

On the command line, `None` unsets an option that allows it. Separate the items of a tuple by commas
(`--config.evaluation.final_depths=1,2,4`). Items that contain commas need a Python list
(`--config.samples.prompts="['Yes, ', 'No, ']"`). Write whole numbers in full: `1000`, not `1e3`.

Presets (`--config.preset=NAME`): {presets}.
"""

_GENERATION = """\
These options of `megatransformer generate` control how a trained model continues prompts. They have
the same names in Python (`lm.generate(prompt, depth=16)`). The command's remaining options, such as
`--prompt`, are listed by `--help`. An option that would have no effect is an error.
"""

_SERVING = """\
These options of `megatransformer serve` say how a model is served. `mt.serve(lm, rows=4)` has them
by the same names. The command's remaining options, such as `--model`, are listed by `--help`.
"""

_REQUESTS = """\
A request may have these fields, next to `prompt`, `logit_bias`, `stream_options` and the options of
[generation](#generation) from `temperature` to `frequency_penalty`, `seed`, `stop`, `depth`,
`min_depth`, `exit_criterion`, `exit_threshold` and `warm_start`. `null` stands for the default. A
running server tells the types and bounds of all fields under `/openapi.json`.
"""

_CHAT = """\
The same, but for `messages` and `chat_template_kwargs` in place of `prompt`.
"""

_TABLE = "| Option | Type | Default | Meaning | Check |\n| --- | --- | --- | --- | --- |"


def options_page() -> str:
    """The page as Markdown."""
    header = _HEADER.format(presets=", ".join(f"`{name}`" for name in preset_names()))
    run = _tables(AllOptions, "The run", "`{}`", lambda path: path)
    generation = _tables(
        GenerationConfig,
        f"Generation\n\n{_GENERATION.strip()}",
        "Generation: {}",
        lambda path: f"--{flag_name(path)}",
    )
    return "\n".join([header, *run, *generation, *_serving()])


def _serving() -> Iterator[str]:
    """Options of a server, and fields of requests."""
    completions, chat = "Requests to /v1/completions", "Requests to /v1/chat/completions"
    serving = f"Serving\n\n{_SERVING.strip()}"
    yield from _tables(ServingConfig, serving, "", lambda path: f"--{path}")
    asked = f"{completions}\n\n{_REQUESTS.strip()}"
    yield from _tables(CompletionRequestConfig, asked, "", lambda path: path)
    yield from _tables(ChatRequestConfig, f"{chat}\n\n{_CHAT.strip()}", "", lambda path: path)


def _tables(
    config_class: type, title: str, section_title: str, shown: Callable[[str], str]
) -> Iterator[str]:
    """The class's own options, then each section; `shown` makes an option's name of its path."""
    options = list(options_of(config_class))
    rules = section_rules(config_class)

    def table(heading: str, path: str, notes: list[str]) -> str:
        rows = [
            _row(option, shown(option.path))
            for option in options
            if option.path.rpartition(".")[0] == path
        ]
        return "\n".join([f"## {heading}\n", *(f"{note}\n" for note in notes), _TABLE, *rows, ""])

    yield table(title, "", [])
    for path, section_class, meaning in sections_of(config_class):
        doc = " ".join((section_class.__doc__ or meaning).split())
        notes = [
            doc,
            *(
                f"For the whole section: {rule[0].lower()}{rule[1:]}"
                for rule in rules.get(path, [])
            ),
        ]
        yield table(section_title.format(path), path, notes)


def _row(option: Option, name: str) -> str:
    check = option.check.describe()
    checks = [f"{check[0].upper()}{check[1:]}."] if check else []
    checks += option.rules
    cells = (
        f"`{name}`",
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
