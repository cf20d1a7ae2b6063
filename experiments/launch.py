"""What every entry point shares: parse the command line, set the environment, report bad input.

An entry point is a function of a `RunConfig` that imports JAX inside, because environment variables
such as XLA_FLAGS count only if they are set before:

    def main(config: RunConfig) -> None:
        from megatransformer_jax.training.run import train
        train(config)

    if __name__ == "__main__":
        launch.run(main)
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import flags, logging

from experiments.flags import (
    PREFIX,
    config_from_flags,
    define_config_flags,
    described,
    unknown_flag,
)
from experiments.log_format import LineFormatter
from megatransformer_jax.config.build import preset_names
from megatransformer_jax.config.option import UserError, options_of, sections_of
from megatransformer_jax.config.run import RunConfig

# Exit codes.
BAD_INPUT = 2
INTERRUPTED = 130  # As a shell reports a program that Ctrl-C has ended.

_HELP = """\
{doc}
usage: python {program} --config=FILE[:ARGUMENT] [--config.OPTION=VALUE ...]

  --config=experiments/configs/recurrent.py         an experiment in Python
  --config=experiments/configs/recurrent.py:tiny    a variant of it that takes under a minute
  --config=mine.yaml                                values in YAML (or .json)
  --config=runs/recurrent/config.json               repeats a run exactly, in another folder with
                                                    --config.workdir=runs/again
  --config.preset=NAME                              a model size: {presets}
  --config.model.recurrence.mean_steps=16           any option, from all of docs/options.md
  --config.evaluation.final_depths=1,2,4            a tuple; also (1,2,4)
  --config.optimizer.clip_norm=None                 an option that may be absent
  --config.data.shuffle=false                       a switch; also --noconfig.data.shuffle

What is given later in this list wins: default, preset, experiment file, command line.
{own}
Sections of options (all with type, default and meaning: --helpfull or docs/options.md):
{sections}
"""


def run(main: Callable[[RunConfig], None], argv: Sequence[str] | None = None) -> None:
    """Runs an entry point with the configuration that the command line describes.

    Flags that the entry point's module defines itself with `absl.flags` are accepted as well.
    Bad input (`UserError`, from here or from `main`) is printed without a traceback, exit code 2;
    Ctrl-C is one line, exit code 130.

    Args:
      main: the entry point; must import JAX inside, not at the top of its module.
      argv: the command line with the program's name; None: `sys.argv`.
    """
    argv = list(sys.argv if argv is None else argv)
    with errors_in_one_line(interrupted="interrupted: nothing more is saved."):
        own_flags = _flags_of(main)
        if wants_help(argv):
            print(help_text(main, own_flags, full="--helpfull" in argv))
            return
        config = parse(argv, own_flags)
        set_environment(config)
        start_logging(config.logging.level)
        main(config)


@contextlib.contextmanager
def errors_in_one_line(interrupted: str) -> Iterator[None]:
    """Ends the program on bad input (exit code 2) and on Ctrl-C (130), without a traceback.

    Args:
      interrupted: what is printed on Ctrl-C.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # `main` has closed what it opened. A usual exit crashes where the interpreter is taken down
        # after Ctrl-C inside JAX's native code (jaxlib on CPU: segmentation fault).
        os._exit(INTERRUPTED)


def start_logging(level: str) -> None:
    """Shows messages from `level` upwards on stderr, each with the time."""
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(LineFormatter())
    logging.set_verbosity(level)


def parse(argv: Sequence[str], own_flags: Sequence[flags.Flag] = ()) -> RunConfig:
    """The configuration that a command line describes (argv[0] is the program).

    Raises:
      UserError: if something in it cannot be used.
    """
    # Only our flags and the entry point's: absl's logging flags would be read and then overruled
    # by config.logging.
    flag_values = flags.FlagValues()
    define_config_flags(flag_values)
    for flag in own_flags:
        flag_values[flag.name] = flag
    read_flags(flag_values, argv, "--config.train.steps=100", _unknown_flag)
    return config_from_flags(flag_values)


def read_flags(
    flag_values: flags.FlagValues,
    argv: Sequence[str],
    example: str,
    unknown: Callable[[flags.UnrecognizedFlagError], UserError],
) -> None:
    """Parses a command line into flags that have been defined.

    Args:
      flag_values: gets the values.
      argv: the command line with the program's name.
      example: an option as it should look, for the error about a stray word.
      unknown: makes the error about a flag that is not defined, from absl's.

    Raises:
      UserError: if something in it cannot be used.
    """
    try:
        rest = flag_values(list(argv))
    except flags.UnrecognizedFlagError as error:
        raise unknown(error) from error
    except flags.Error as error:
        raise UserError(f"{error}") from error
    if len(rest) > 1:
        raise UserError(
            f"{rest[1]!r} is no option; options look like {example}. Quote values that hold spaces."
        )
    # Libraries that read absl's flags must find them parsed.
    flags.FLAGS.mark_as_parsed()


def _unknown_flag(error: flags.UnrecognizedFlagError) -> UserError:
    if error.flagname.startswith(PREFIX):
        return unknown_flag(error.flagname)
    return UserError(f"{error}; see --help.")


def set_environment(config: RunConfig) -> None:
    """Puts `config.environment` into the process environment.

    Raises:
      RuntimeError: if JAX has been imported already, which would not see it.
    """
    if config.environment and "jax" in sys.modules:
        raise RuntimeError(
            "JAX is already imported, so config.environment would have no effect; "
            "import JAX inside the entry point's main function."
        )
    os.environ.update(dict(pair.split("=", 1) for pair in config.environment))


def help_text(
    main: Callable[[RunConfig], None], own_flags: Sequence[flags.Flag] = (), full: bool = False
) -> str:
    """What --help prints; with `full`, every option too."""
    module = sys.modules[main.__module__]
    spec = getattr(module, "__spec__", None)
    program = f"-m {spec.name}" if spec is not None else sys.argv[0]
    own = "".join(f"\n  --{flag.name}: {flag.help} (default: {flag.default})" for flag in own_flags)
    text = _HELP.format(
        doc=(module.__doc__ or "").strip() + "\n",
        program=program,
        presets=", ".join(preset_names()),
        own=f"\nOptions of this command:{own}\n" if own else "",
        sections="\n".join(_section_lines()),
    )
    return text + "\n".join(_full_lines()) if full else text


def _section_lines() -> list[str]:
    """One line per section, with the names of those inside it."""
    paths = [path for path, *_ in sections_of(RunConfig)]
    lines = []
    for path, _, meaning in sections_of(RunConfig):
        if "." not in path:
            inside = [p.removeprefix(f"{path}.") for p in paths if p.startswith(f"{path}.")]
            lines.append(f"  config.{path}: {meaning}" + f" ({', '.join(inside)})" * bool(inside))
    return lines


def _full_lines() -> list[str]:
    lines = ["All options:"]
    for option in options_of(RunConfig):
        lines += described(option, PREFIX + option.path)
    return lines


def wants_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help and nothing else."""
    return any(word in ("-h", "-help", "--help", "-helpfull", "--helpfull") for word in argv[1:])


def _flags_of(main: Callable[[RunConfig], None]) -> list[flags.Flag]:
    """Flags that the module of `main` defines."""
    # absl files the flags of a program under its path.
    module = sys.argv[0] if main.__module__ == "__main__" else main.__module__
    return list(flags.FLAGS.flags_by_module_dict().get(module, []))
