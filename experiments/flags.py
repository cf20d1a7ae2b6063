"""Command-line flags made from the configuration dataclasses, such as --config.model.width=256."""

import dataclasses
from typing import Any

import ml_collections
from absl import flags

from megatransformer_jax.config.build import (
    build,
    load_preset,
    merge,
    preset_names,
    read_experiment,
    to_dict,
)
from megatransformer_jax.config.option import (
    Option,
    UserError,
    options_of,
    parse_text,
    sections_of,
    type_name,
    unknown_key,
)
from megatransformer_jax.config.run import RunConfig

PREFIX = "config."


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


def define_config_flags(flag_values: flags.FlagValues) -> None:
    """Defines --config=FILE and one flag for every option."""
    flags.DEFINE_string(
        "config",
        None,
        "Experiment: a .py file with get_config (may be followed by ':argument'), or a .yaml, .yml "
        "or .json file, such as the config.json of a run.",
        flag_values=flag_values,
    )
    for option in options_of(RunConfig):
        define_flag(flag_values, PREFIX + option.path, option)


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


def described(option: Option, name: str) -> list[str]:
    """Lines of help about an option whose flag has this name."""
    notes = [option.check.describe(), *option.rules]
    return [
        f"  --{name} ({type_name(option.declared)})",
        f"      {option.meaning}",
        f"      default: {option.default!r}",
        *(f"      {note}" for note in notes if note),
    ]


def config_from_flags(flag_values: flags.FlagValues) -> RunConfig:
    """The run that parsed flags describe: defaults < preset < experiment file < command line.

    Raises:
      UserError: if a value cannot be used, or there is neither a file nor a preset.
    """
    file_values = read_experiment(flag_values.config) if flag_values.config is not None else {}
    given = _given_values(flag_values)
    name = given.get("preset", file_values.get("preset"))
    if flag_values.config is None and name is None:
        raise UserError(
            "no experiment given; add --config=FILE, for example "
            "--config=experiments/configs/recurrent.py, or a size for the defaults, "
            f"--config.preset=NAME ({', '.join(preset_names())})."
        )
    preset_values = load_preset(name) if name is not None else {}
    if name is not None and "preset" in given:
        _check_preset_has_effect(name, preset_values, file_values)
    surface = ml_collections.ConfigDict(to_dict(RunConfig()), convert_dict=True, type_safe=False)
    surface.lock()
    for layer in (preset_values, file_values, given):
        surface.update(layer)
    return build(surface)


def unknown_flag(name: str) -> UserError:
    """The error for a flag that starts with `config.` and is not defined."""
    path = name.removeprefix(PREFIX)
    full_paths = [o.path for o in options_of(RunConfig) if o.path.endswith(f".{path}")]
    if full_paths:
        return UserError(
            f"--{name}: write it in full, --{PREFIX}{f' or --{PREFIX}'.join(full_paths)}."
        )
    sections = {section: owner for section, owner, _ in sections_of(RunConfig)}
    if path in sections:
        example = next(iter(options_of(sections[path]))).path
        return UserError(
            f"--{name}: is a section; set its options one by one, such as --{name}.{example}=..."
        )
    parent = path.rpartition(".")[0]
    while parent and parent not in sections:
        path, parent = parent, parent.rpartition(".")[0]
    if any(option.path == path for option in options_of(RunConfig)):
        return UserError(f"--{name}: {path} is an option, not a section; nothing is below it.")
    owner = sections.get(parent, RunConfig)
    return unknown_key(path, [field.name for field in dataclasses.fields(owner)])


def _given_values(flag_values: flags.FlagValues) -> dict[str, Any]:
    """Nested values of the options that the command line names."""
    values: dict[str, Any] = {}
    for option in options_of(RunConfig):
        flag = flag_values[PREFIX + option.path]
        if flag.present:
            nested: Any = flag.value
            for part in reversed(option.path.split(".")):
                nested = {part: nested}
            values = merge(values, nested)
    return values


def _check_preset_has_effect(
    name: str, preset_values: dict[str, Any], file_values: dict[str, Any]
) -> None:
    if merge(preset_values, file_values) == file_values:
        raise UserError(
            f"--config.preset={name}: would be ignored, because the config file itself sets all "
            "that the preset sets; remove the flag, or use a file that leaves sizes to the preset."
        )
