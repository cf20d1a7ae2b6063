"""What storage says when it fails, in words."""

import errno
import os

import pytest

from megatransformer_jax.config.option import TRY_AGAIN
from megatransformer_jax.failures import SaveFailed, fix_of, is_full, storage_problem


def error_of_client() -> Exception:
    """As gcsfs raises it, whose errors have a class of their own."""
    return type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("Forbidden, 403")


def raised_from(error: Exception) -> Exception:
    outer = RuntimeError("the save failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "problem", "fix"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device", "make room"),
        (raised_from(OSError(errno.EROFS, "Read-only", "a/b")), "a/b: Read-only", "the right"),
        (
            ValueError(
                'RESOURCE_EXHAUSTED: Error writing "a": Failed to write 3 bytes to file 4: No '
                "space left on device [os_error_code='28']"
            ),
            "No space left on device",
            "make room",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), "a: Not a directory", "put"),
        (OSError("Forbidden: b/bucket\nno"), "Forbidden: b/bucket no", "the right"),
        (error_of_client(), "Forbidden, 403", "the right"),
        (ExceptionGroup("2", [TimeoutError()]), "TimeoutError", "see to the storage"),
        (ValueError("UNAVAILABLE: try later"), "UNAVAILABLE: try later", "see to the storage"),
    ],
)
def test_a_problem_of_storage_is_named_with_its_fix(error, problem, fix):
    assert storage_problem(error) == problem
    assert fix in fix_of(error)


@pytest.mark.parametrize(
    "error", [TypeError("not JSON"), raised_from(AssertionError()), ValueError("shape (2, 3)")]
)
def test_mistakes_of_the_program_keep_their_traceback(error):
    assert storage_problem(error) is None


def test_full_disks_are_told_from_other_problems():
    full = raised_from(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))
    assert is_full(full) and not is_full(OSError(errno.EACCES, "Permission denied"))
    assert SaveFailed("x").exit_code == TRY_AGAIN
