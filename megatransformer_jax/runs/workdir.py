"""A run's folder: who holds it, its log file, and what of other libraries' messages is shown."""

import contextlib
import functools
import hashlib
import logging
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import logging as absl_logging

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.runs.lease import lease_of
from megatransformer_jax.storage import (
    CHECKPOINTS,
    NO_CHECKPOINTS,
    AnyPath,
    as_path,
    is_bucket_path,
    local_path,
    lock_opened,
    make_and_probe,
)

# This library, which an installed one has in site-packages too.
_PACKAGE = pathlib.Path(__file__).parents[1]

# ------------------------------------------------------------------------------
# Folders and logs.


def make_workdir(path: str) -> AnyPath:
    """The folder, made if absent, as an absolute path; it may be at gs://.

    Raises:
      ConfigError: if it cannot be made or written to.
    """
    return make_and_probe("workdir", as_path("workdir", path, CHECKPOINTS, NO_CHECKPOINTS))


class Workdir(NamedTuple):
    """The folder of a run.

    Attributes:
      root: as the configuration names it, on this machine or in a bucket. Checkpoints and the
        tokenizer are written there.
      files: on this machine. Whatever else the run writes goes there: `root`, or a folder whose
        files are copied to it.
    """

    root: AnyPath
    files: pathlib.Path

    def final(self, path: pathlib.Path) -> AnyPath:
        """Where a file of `files` is, or will be when it has been copied."""
        return self.root / path.relative_to(self.files)


def check_empty(option: str, folder: AnyPath) -> None:
    """Checks, before anything is computed, that a folder is absent or empty.

    Raises:
      ConfigError: otherwise.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(
            option, f"{folder} is not an empty folder; name another, or delete it first."
        )


def make_folder(option: str, path: str) -> pathlib.Path:
    """The folder of this machine that an option names, made if absent, as an absolute path.

    Raises:
      ConfigError: if it is in a bucket, or cannot be made or written to.
    """
    return make_and_probe(option, local_path(option, path))


_CACHE_OPTION = "jax_compilation_cache_dir"
# In the user's home.
_CACHE = pathlib.Path(".cache", "megatransformer_jax", "xla")
# JAX keeps what took a second; generation compiles dozens of programs that take less each.
_MIN_COMPILE_S = 0.1


def use_compilation_cache(folder: str | None) -> None:
    """Keeps the programs that this process compiles, and takes those that others have kept.

    Args:
      folder: see `compilation_cache_option`. A home that cannot be written to is no error.

    Raises:
      ConfigError: if a folder that is named cannot be made or written to, or is in a bucket that
        is not served.
    """
    # Commands import this module before they set JAX's environment.
    import jax  # noqa: PLC0415
    from jax.experimental.compilation_cache import compilation_cache  # noqa: PLC0415

    has_one = getattr(jax.config, _CACHE_OPTION) is not None
    if folder is None or (folder == "auto" and has_one):
        return
    if folder == "auto":
        try:
            home = pathlib.Path.home()
            path: AnyPath = make_folder("compilation_cache_dir", str(home / _CACHE / _processor()))
        except (ConfigError, RuntimeError) as error:  # RuntimeError: the user has no home.
            absl_logging.info("compiled programs are not kept: %s", error)
            return
    else:
        named = as_path("compilation_cache_dir", folder)
        path = make_and_probe("compilation_cache_dir", named)
        if is_bucket_path(path):
            # XLA's cache for GPUs, which JAX would put there, is a folder of this machine only.
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update(_CACHE_OPTION, str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_S)
    # JAX looks once whether there is a cache, when it compiles its first program.
    compilation_cache.reset_cache()


def _processor() -> str:
    """A name for the instructions that this machine has.

    Programs for a CPU use all of them, JAX's keys do not name them, and homes are shared.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    # x86 and ARM call them so. The rest of the file has numbers that change all the time.
    flags = [line for line in lines if line.split(":")[0].strip() in ("flags", "Features")]
    name = flags[0] if flags else platform.processor()
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"


@contextlib.contextmanager
def quiet_libraries(level: str) -> Iterator[None]:
    """Shows what other libraries log from warnings upwards only, unless the level is 'debug'.

    An error that leaves the block ends the command, and Orbax's threads may still talk after it.
    """
    handler, hook = absl_logging.get_absl_handler(), sys.unraisablehook
    if level != "debug":
        handler.addFilter(_own_or_important)
        if getattr(hook, "func", None) is not _show_unless_late:
            sys.unraisablehook = functools.partial(_show_unless_late, hook)
    try:
        yield
        sys.unraisablehook = hook
    finally:
        handler.removeFilter(_own_or_important)


def _show_unless_late(hook: Callable[[Any], Any], unraisable: Any) -> None:
    """Leaves out what Orbax's threads say of arrays that end after another's failure."""
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


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
    """Also appends what is logged to a file. A disk that is full ends the file, not the run."""
    handler = _LogFile(path, encoding="utf-8")
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


class _LogFile(logging.FileHandler):
    """Does without a line that cannot be written, and says so once."""

    _is_failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Instead of a traceback per line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_failing:
            self._is_failing = True  # The warning comes here too.
            absl_logging.warning("%s cannot be written (%s).", self.baseFilename, error.strerror)

    def close(self) -> None:
        """Gives up what is not written yet and cannot be."""
        with contextlib.suppress(OSError):
            super().close()


def _own_or_important(record: logging.LogRecord) -> bool:
    if record.exc_info and "/orbax/" in record.pathname:
        return False  # What failed is raised later, and told in one line.
    is_important = record.levelno >= logging.WARNING
    is_own = pathlib.Path(record.pathname).is_relative_to(_PACKAGE)
    return is_important or is_own or "site-packages" not in record.pathname


# ------------------------------------------------------------------------------
# Tells whether a run is writing to a workdir.

# Every run has it from its start, so no file of its own is needed.
LOCKED_FILE = "train.log"


@contextlib.contextmanager
def hold_workdir(workdir: AnyPath) -> Iterator[None]:
    """Keeps others from writing to a workdir; ends with the process, however that ends.

    Args:
      workdir: of a run; without a log no run has begun, and nothing is held. In a bucket it is held
        by a lease, which others may take five minutes after the process has ended badly.

    Raises:
      UserError: if another process holds it.
    """
    path = workdir / LOCKED_FILE
    with contextlib.ExitStack() as stack:
        if is_bucket_path(workdir):
            stack.enter_context(lease_of(workdir))
        elif path.is_file():
            file = stack.enter_context(path.open("rb"))
            lock_opened(
                file.fileno(),
                path,
                taken=f"{workdir}: a run is writing to this workdir; wait until it has ended, stop "
                "it (Ctrl-C saves; in Python close() of its Trainer), or name another workdir.",
                otherwise="make sure that no other run uses this workdir",
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
