"""A run's folder: who holds it, its log file, and what of other libraries' messages is shown."""

import contextlib
import fcntl
import logging
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import logging as absl_logging

from megatransformer_jax.config.option import ConfigError, UserError

# This library, which an installed one has in site-packages too.
_PACKAGE = pathlib.Path(__file__).parents[1]

# ------------------------------------------------------------------------------
# Folders and logs.


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
def shown_logs(level: str) -> Iterator[None]:
    """Shows our own messages from `level` upwards on stderr; then all is as it was before.

    For callers that have not set up logging themselves, such as notebooks. Where absl's handler is
    in use, as in the commands, and inside of another such block, nothing is added.
    """
    root = logging.getLogger()
    is_shown = any(type(handler) is _ScreenHandler for handler in root.handlers)
    if is_shown or absl_logging.get_absl_handler() in root.handlers:
        yield
        return
    screen = _ScreenHandler()
    screen.setFormatter(LineFormatter())
    if level != "debug":
        screen.addFilter(_own_or_important)
    # Others that write to the screen would show everything twice; files and tests still get it.
    others = [other for other in root.handlers if type(other) is logging.StreamHandler]
    verbosity = absl_logging.get_verbosity()
    for other in others:
        other.addFilter(_is_of_others)
    root.addHandler(screen)
    absl_logging.set_verbosity(level)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
        root.removeHandler(screen)
        for other in others:
            other.removeFilter(_is_of_others)


class _ScreenHandler(logging.StreamHandler):
    """Writes to whatever stderr is at the time: a progress bar replaces it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """The present stderr."""
        return sys.stderr


def _is_of_others(record: logging.LogRecord) -> bool:
    return record.name != "absl"


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
    is_important = record.levelno >= logging.WARNING
    is_own = pathlib.Path(record.pathname).is_relative_to(_PACKAGE)
    return is_important or is_own or "site-packages" not in record.pathname


# ------------------------------------------------------------------------------
# Tells whether a run is writing to a workdir.

# Every run has it from its start, so no file of its own is needed.
LOCKED_FILE = "train.log"


@contextlib.contextmanager
def hold_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps others from writing to a workdir; ends with the process, however that ends.

    Args:
      workdir: of a run; without a log no run has begun, and nothing is held.

    Raises:
      UserError: if another process holds it.
    """
    path = workdir / LOCKED_FILE
    with contextlib.ExitStack() as stack:
        if path.is_file():
            file = stack.enter_context(path.open("rb"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{workdir}: a run is writing to this workdir; wait until it has ended, stop "
                    "it (Ctrl-C saves; in Python close() of its Trainer), or name another workdir."
                ) from error
            except OSError as error:  # Some network file systems have no locks.
                absl_logging.warning(
                    "%s cannot be locked (%s): make sure that no other run uses this workdir.",
                    path,
                    error.strerror,
                )
        yield


# ------------------------------------------------------------------------------
# How a line of the log looks: the time, the level if it matters, the message.


class LineFormatter(logging.Formatter):
    """`12:34:56 step 10/700 ...`; from warnings upwards the level comes before the message.

    Args:
      has_date: puts the date before the time, for a file that outlives the day.
    """

    def __init__(self, has_date: bool = False):
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S" if has_date else "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, to which the base class adds a traceback if there is one."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        return f"{self.formatTime(record, self.datefmt)} {level}{record.message}"
