"""The one parser and the one help page of all commands.

A command is a dataclass of options (`config.option`), perhaps with options of generation or the
whole configuration of a run as well. Its flags, help and error messages follow from that.
"""

import contextlib
import dataclasses
import textwrap
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from megatransformer_jax.config.build import (
    configure,
    experiment_names,
    merge,
    preset_names,
)
from megatransformer_jax.config.generation import GENERATION_OPTIONS, GenerationConfig, flag_name
from megatransformer_jax.config.option import (
    ConfigError,
    Option,
    UserError,
    nearest_hint,
    options_of,
    parse_text,
    section_rules,
    sections_of,
    type_name,
    unknown_key,
)
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.config.run_kinds import AllOptions

PREFIX = "config."
PROGRAM = "megatransformer"
_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command reads from its command line, and what it does with it.

    Attributes:
      name: as it is typed, such as 'find-lr'.
      doc: what it does.
      options: dataclass of its own options.
      run: does it. JAX is imported inside, so that help and errors need not wait for it.
      examples: command lines without the program, each with its options.
      generation: options of generation that it takes too, by their short names.
      generation_defaults: of these, where they are not those of `GenerationConfig`.
      takes_run: whether --config and --config.OPTION describe a run.
      check: of its own options and the values of generation that were named; called before
        generation is built from those.
      repeated: options that may be given several times, and whose values may hold commas.
      words: the option that collects words without dashes; None: there are none.
      old_names: former names of options, and names of other commands that mean the same.
      hints: what a user may mean by a name that is not an option here.
    """

    name: str
    doc: str
    options: type
    run: Callable[["Parsed"], None]
    examples: Sequence[str] = ()
    generation: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    generation_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    takes_run: bool = False
    check: Callable[[Any, Mapping[str, Any]], None] = lambda options, given: None
    repeated: Sequence[str] = ()
    words: str | None = None
    old_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def own(self) -> dict[str, Option]:
        """Its own options by name."""
        return {option.path: option for option in options_of(self.options)}

    @property
    def known(self) -> list[str]:
        """Names of all options but those of a run."""
        return [*self.own, *self.generation, *(["config"] if self.takes_run else [])]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A command line.

    Attributes:
      options: the command's own, an instance of `Command.options`.
      given: values of the options of generation that were named, by their short names.
      generation: what they describe.
      config: of a run; None if the command takes none, or none was named.
    """

    options: Any
    given: dict[str, Any]
    generation: GenerationConfig
    config: BaseRunConfig | None


def parse(command: Command, arguments: Sequence[str]) -> Parsed:
    """What the words after a command's name ask for.

    Raises:
      UserError: if something in them cannot be used; options are named as they are written.
    """
    flag_values = _define(command)
    words = _read(flag_values, command, arguments)
    given = {name: flag_values[name].value for name in flag_values if flag_values[name].present}
    given = _with_new_names(command, given)
    if words and command.words is None:
        raise UserError(
            f"{words[0]!r} is not an option; options look like --{command.known[0]}=VALUE. Quote "
            "values that hold spaces."
        )
    if words and command.words is not None:
        given[command.words] = (*given.get(command.words, ()), *words)
    given |= {name: tuple(given[name]) for name in command.repeated if name in given}
    of_generation = {name: given[name] for name in given if name in command.generation}
    with named_as_written(command.known):
        options = command.options(**{name: given[name] for name in given if name in command.own})
        command.check(options, of_generation)
        generation = GenerationConfig.of(**{**command.generation_defaults, **of_generation})
        config = config_from_flags(flag_values) if command.takes_run else None
    return Parsed(options, of_generation, generation, config)


def _define(command: Command) -> flags.FlagValues:
    """Flags of the command alone: absl's own of logging would be read and then overruled."""
    flag_values = flags.FlagValues()
    flag_values.set_gnu_getopt(True)  # Words may stand between options.
    for name, option in {**command.own, **command.generation}.items():
        if name in command.repeated:
            flags.DEFINE_multi_string(name, None, option.meaning, flag_values=flag_values)
        else:
            define_flag(flag_values, name, option)
    for old, name in command.old_names.items():
        if name in command.repeated:
            flags.DEFINE_multi_string(old, None, "", flag_values=flag_values)
        else:
            define_flag(flag_values, old, command.own[name])
    if command.takes_run:
        define_config_flags(flag_values)
    return flag_values


def define_flag(flag_values: flags.FlagValues, name: str, option: Option) -> None:
    """Defines one flag for an option; its value is None unless the command line names it."""
    flag: flags.Flag = flags.Flag(
        parser=_OptionParser(option.declared),
        serializer=None,
        name=name,
        default=None,
        help_string=option.meaning,
        boolean=option.declared is bool,
    )
    flags.DEFINE_flag(flag, flag_values)


class _OptionParser(flags.ArgumentParser):
    """Reads text by the declared type of one option."""

    def __init__(self, declared: Any):
        self._declared = declared

    def parse(self, argument: str) -> Any:
        """The value that the text stands for; UserError if it does not fit the type."""
        return parse_text(argument, self._declared)

    def flag_type(self) -> str:
        """The type in words."""
        return type_name(self._declared)


def _read(
    flag_values: flags.FlagValues, command: Command, arguments: Sequence[str]
) -> Sequence[str]:
    """Parses; returns the words without dashes."""
    booleans = [name for name, option in command.own.items() if option.declared is bool]
    # argparse, which commands used before, writes --no-name where absl writes --noname.
    plain = {f"--no{mark}{name}": f"--no{name}" for name in booleans for mark in "-_"}
    arguments = [plain.get(word, word) for word in arguments]
    try:
        rest = flag_values([PROGRAM, *arguments])
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(command, error.flagname) from error
    except flags.Error as error:
        raise UserError(f"{error}") from error
    # Libraries that read absl's flags must find them parsed.
    flags.FLAGS.mark_as_parsed()
    return rest[1:]


def _with_new_names(command: Command, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the names that options have now."""
    renamed: dict[str, Any] = {}
    for name, value in given.items():
        current = command.old_names.get(name, name)
        if current in renamed:
            raise UserError(f"--{name} is another name of --{current}; give one of the two.")
        renamed[current] = value
    return renamed


# ------------------------------------------------------------------------------
# Errors name options as the user writes them.


@contextlib.contextmanager
def named_as_written(known: Container[str], mark: str = "--") -> Iterator[None]:
    """Errors about an option with one of the names have it short, and after `mark`."""
    try:
        yield
    except ConfigError as error:
        name = flag_name(error.path)
        if name not in known:
            raise
        raise UserError(f"{mark}{name}: {error.problem}") from error


def _unknown_flag(command: Command, name: str) -> UserError:
    if command.takes_run and name.startswith(PREFIX):
        return _unknown_config_flag(name)
    if name in command.hints:
        return UserError(f"--{name}: no such option; {command.hints[name]}")
    return unknown_name(name, command.known, "--")


def unknown_name(name: str, known: Iterable[str], mark: str) -> UserError:
    """The error about a name that is not an option, with the nearest one if there is any."""
    by_path = {option.path: short for short, option in GENERATION_OPTIONS.items()}
    plain = name.replace("-", "_")
    known = list(known)
    if name in by_path and by_path[name] in known:
        plain = by_path[name]
    hint = nearest_hint(plain, known, lambda near: f"{mark}{near}")
    return UserError(f"{mark}{name}: no such option; {hint}{mark}help lists all.")


# ------------------------------------------------------------------------------
# Flags of a run's configuration, such as --config.model.width=256.


def define_config_flags(flag_values: flags.FlagValues) -> None:
    """Defines --config=FILE and one flag for every option."""
    flags.DEFINE_string("config", None, "Experiment.", flag_values=flag_values)
    for option in options_of(AllOptions):
        define_flag(flag_values, PREFIX + option.path, option)


def config_from_flags(flag_values: flags.FlagValues) -> BaseRunConfig | None:
    """The run that parsed flags describe: defaults < preset < experiment file < command line.

    Returns:
      The run; None if there is neither a file nor a preset nor any option.

    Raises:
      UserError: if a value cannot be used, or there are options but nothing to start from.
    """
    given = _given_values(flag_values)
    if flag_values.config is None and not given:
        return None
    return configure(flag_values.config, given)


def _given_values(flag_values: flags.FlagValues) -> dict[str, Any]:
    """Nested values of the options that the command line names."""
    values: dict[str, Any] = {}
    for option in options_of(AllOptions):
        flag = flag_values[PREFIX + option.path]
        if flag.present:
            nested: Any = flag.value
            for part in reversed(option.path.split(".")):
                nested = {part: nested}
            values = merge(values, nested)
    return values


def _unknown_config_flag(name: str) -> UserError:
    """The error for a flag that starts with `config.` and is not defined."""
    path = name.removeprefix(PREFIX)
    full_paths = [o.path for o in options_of(AllOptions) if o.path.endswith(f".{path}")]
    if full_paths:
        return UserError(
            f"--{name}: write it in full, --{PREFIX}{f' or --{PREFIX}'.join(full_paths)}."
        )
    sections = {section: owner for section, owner, _ in sections_of(AllOptions)}
    if path in sections:
        example = next(iter(options_of(sections[path]))).path
        return UserError(
            f"--{name}: is a section; set its options one by one, such as --{name}.{example}=..."
        )
    parent = path.rpartition(".")[0]
    while parent and parent not in sections:
        path, parent = parent, parent.rpartition(".")[0]
    if any(option.path == path for option in options_of(AllOptions)):
        return UserError(f"--{name}: {path} is an option, not a section; nothing is below it.")
    owner = sections.get(parent, AllOptions)
    return unknown_key(path, [field.name for field in dataclasses.fields(owner)])


# ------------------------------------------------------------------------------
# Help pages.

_OF_RUNS = """\
The run:
  --config=recurrent                                an experiment that is shipped
  --config=recurrent:tiny                           a variant of it
  --config=my/experiment.py                         your own in Python (or .yaml, .json)
  --config=runs/recurrent/config.json               repeats a run exactly, in another folder with
                                                    --config.workdir=runs/again
  --config.preset=tiny                              a model size
  --config.model.recurrence.mean_steps=16           any option, from all of docs/options.md
  --config.evaluation.final_depths=1,2,4            a tuple; also (1,2,4)
  --config.optimizer.clip_norm=None                 an option that may be absent
  --config.data.shuffle=false                       a switch; also --noconfig.data.shuffle

What is given later in this list wins: default, preset, experiment file, command line.
{experiments}
{presets}
Sections of options (all with type, default and meaning: --helpfull or docs/options.md):
{sections}"""

_OF_VALUES = """\
Values are written as --name=VALUE; a switch as --name or --noname. Items of a tuple are separated
by commas; items that hold commas, or \\n for a new line, need a Python list: "['.', '\\n']". None
unsets what may be None. An option that would have no effect is an error."""


def help_page(command: Command, *, full: bool = False) -> str:
    """What --help prints; with `full`, every option of a run too."""
    words = f" [{command.words.upper()} ...]" if command.words else ""
    usage = f"Usage: {PROGRAM} {command.name}{words} [--option=VALUE ...]"
    parts = [usage, command.doc.strip()]
    if command.examples:
        lines = [f"  {PROGRAM} {command.name} {example}" for example in command.examples]
        parts.append("\n".join(["Examples:", *lines]))
    parts.append(_OF_VALUES)
    if command.own:
        parts.append("Options:\n" + _lines(command.own))
    if command.generation:
        parts += _generation_parts(command.generation)
    if command.takes_run:
        parts.append(
            _OF_RUNS.format(
                experiments=_wrapped(f"Experiments: {', '.join(experiment_names())}."),
                presets=_wrapped(f"Presets: {', '.join(preset_names())}."),
                sections="\n".join(map(_wrapped, _section_lines())),
            )
        )
    if command.takes_run and full:
        of_run = {PREFIX + option.path: option for option in options_of(AllOptions)}
        parts.append("All options of a run:\n" + _lines(of_run))
    return "\n\n".join(parts)


def _generation_parts(taken: Mapping[str, Option]) -> Iterator[str]:
    """Options of generation by section, with the rules of the section."""
    rules = section_rules(GenerationConfig)
    yield "Generation:\n" + _lines(_of_section(taken, ""))
    for path, owner, meaning in sections_of(GenerationConfig):
        options = _of_section(taken, path)
        if options:
            notes = [(owner.__doc__ or meaning).strip(), *rules.get(path, ())]
            title = " ".join([f"{path.capitalize()}:", *" ".join(notes).split()])
            yield f"{textwrap.fill(title, _WIDTH)}\n{_lines(options)}"


def _of_section(options: Mapping[str, Option], path: str) -> dict[str, Option]:
    return {
        name: option for name, option in options.items() if option.path.rpartition(".")[0] == path
    }


def _section_lines() -> list[str]:
    """One line per section of a run, with the names of those inside it."""
    paths = [path for path, *_ in sections_of(AllOptions)]
    lines = []
    for path, _, meaning in sections_of(AllOptions):
        if "." not in path:
            inside = [p.removeprefix(f"{path}.") for p in paths if p.startswith(f"{path}.")]
            lines.append(f"  config.{path}: {meaning}" + f" ({', '.join(inside)})" * bool(inside))
    return lines


def described(option: Option, name: str) -> list[str]:
    """Lines of help about an option whose flag has this name."""
    notes = [option.check.describe(), *option.rules]
    return [
        f"  --{name} ({type_name(option.declared)})",
        f"      {option.meaning}",
        f"      Default: {option.default!r}",
        *(f"      {note}" for note in notes if note),
    ]


def _lines(options: Mapping[str, Option]) -> str:
    lines = [line for name, option in options.items() for line in described(option, name)]
    return "\n".join(_wrapped(line) for line in lines)


def _wrapped(line: str) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(line, _WIDTH, subsequent_indent=indent, break_on_hyphens=False)
