"""Tells whether a run is writing to a workdir."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

from absl import logging

from megatransformer_jax.config.option import UserError

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
                    "it (Ctrl-C saves), or name another workdir."
                ) from error
            except OSError as error:  # Some network file systems have no locks.
                logging.warning(
                    "%s cannot be locked (%s): make sure that no other run uses this workdir.",
                    path,
                    error.strerror,
                )
        yield
