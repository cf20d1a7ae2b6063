"""What every command shares: it sets the environment, logs, and reports bad input in one line."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from absl import logging

from megatransformer_jax.cli.flags import Command, help_page, named_as_written, parse
from megatransformer_jax.config.option import TRY_AGAIN, ConfigError, UserError
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.failures import is_full, storage_problem
from megatransformer_jax.runs.workdir import LineFormatter, quiet_libraries
from megatransformer_jax.storage import local_path

# The exit code that a shell reports of a program that Ctrl-C has ended. Those of errors are in
# `UserError.exit_code`.
INTERRUPTED = 130

# A pipe or a file has no width, and a table should not be cut there.
PLAIN_WIDTH = 140


def run_command(command: Command, arguments: Sequence[str]) -> None:
    """Does what a command line asks for.

    Bad input (`UserError`) is printed without a traceback, exit code 2, or 3 if the same command
    may succeed later; Ctrl-C is one line, exit code 130.

    Args:
      command: the command.
      arguments: the words after its name.
    """
    with errors_in_one_line():
        if wants_help(arguments):
            try:
                print(help_page(command, full=wants_full_help(arguments)), flush=True)
            except BrokenPipeError:
                drop_output()
            return
        parsed = parse(command, arguments)
        level = "info"
        if parsed.config is not None:
            set_environment(parsed.config)
            level = parsed.config.logging.level
        start_logging(level)
        with quiet_libraries(level), named_as_written(command.known), modules_from_here():
            command.run(parsed)


def drop_output() -> None:
    """For a reader of stdout, such as `head`, that has enough.

    At exit Python would write what is left, and fail again.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the program without a traceback.

    Exit codes: that of a `UserError`, 2 or 3; a disk that is full or may not be written to: 3;
    Ctrl-C: 130.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if not is_full(error):
            raise
        print(
            f"error: {storage_problem(error)}; make room, then start the same command again.",
            file=sys.stderr,
        )
        sys.exit(TRY_AGAIN)
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # `run` has closed what it opened. A usual exit crashes where the interpreter is taken down
        # after Ctrl-C inside JAX's native code (jaxlib on CPU: segmentation fault).
        os._exit(INTERRUPTED)


@contextlib.contextmanager
def modules_from_here() -> Iterator[None]:
    """Lets options name functions in files of the current folder, however the program was started.

    `python -m` looks there by itself, a console script does not. Installed modules take precedence.
    """
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def start_logging(level: str) -> None:
    """Shows messages from `level` upwards on stderr, each with the time."""
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(LineFormatter())
    logging.set_verbosity(level)


def set_environment(config: BaseRunConfig) -> None:
    """Puts `config.environment` into the process environment.

    Raises:
      ConfigError: if JAX has been imported already, which would not see it.
    """
    if config.environment and "jax" in sys.modules:
        raise ConfigError(
            "environment",
            f"{config.environment!r} would have no effect, because JAX is already imported (the "
            "experiment 'retrofit' reads a model with it); set the variables in the shell instead.",
        )
    os.environ.update(dict(pair.split("=", 1) for pair in config.environment))


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help and nothing else."""
    return wants_full_help(arguments) or any(
        word in ("-h", "-help", "--help") for word in arguments
    )


def wants_full_help(arguments: Sequence[str]) -> bool:
    """Whether it asks for every option of a run."""
    return any(word in ("-helpfull", "--helpfull") for word in arguments)


def write_file(name: str, path: str, text: str) -> None:
    """Writes what option `name` asked for to its file.

    Raises:
      ConfigError: if it cannot be written.
    """
    file = local_path(name, path)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            name, f"{path} cannot be written ({error.strerror}); choose another file."
        ) from error
