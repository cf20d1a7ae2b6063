"""A run's folder, its log file, and what of other libraries' messages is shown."""

import contextlib
import logging
import pathlib
import tempfile
from collections.abc import Iterator

from absl import logging as absl_logging

from experiments.log_format import LineFormatter
from megatransformer_jax.config.option import ConfigError


def make_workdir(path: str) -> pathlib.Path:
    """The folder, made if absent, as an absolute path.

    Raises:
      ConfigError: if it cannot be made or written to.
    """
    return make_folder("workdir", path)


def make_folder(option: str, path: str) -> pathlib.Path:
    """The folder that an option names, made if absent, as an absolute path.

    Raises:
      ConfigError: if it cannot be made or written to.
    """
    folder = pathlib.Path(path).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            option, f"{path!r} cannot be written to ({error.strerror}); choose another folder."
        ) from error
    return folder


@contextlib.contextmanager
def quiet_libraries(level: str) -> Iterator[None]:
    """Shows what other libraries log from warnings upwards only, unless the level is 'debug'."""
    handler = absl_logging.get_absl_handler()
    if level != "debug":
        handler.addFilter(_own_or_important)
    try:
        yield
    finally:
        handler.removeFilter(_own_or_important)


@contextlib.contextmanager
def log_file(path: pathlib.Path, level: str) -> Iterator[None]:
    """Also appends what is logged to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(LineFormatter(has_date=True))
    if level != "debug":
        handler.addFilter(_own_or_important)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _own_or_important(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "site-packages" not in record.pathname
