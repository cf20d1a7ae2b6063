"""What storage says when it fails, in words."""

import errno
import os

import pytest

from megatransformer_jax.config.option import TRY_AGAIN, UserError
from megatransformer_jax.failures import (
    NoAnswer,
    SaveFailed,
    check_answered,
    fix_of,
    is_full,
    may_pass,
    storage_problem,
)


def error_of_client(code: int = 403) -> Exception:
    """As gcsfs raises it, whose errors have a class of their own."""
    attributes = {"__module__": "gcsfs.retry", "code": code}
    return type("HttpError", (Exception,), attributes)(f"Forbidden, {code}")


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


def test_answers_that_may_be_others_later():
    assert may_pass(raised_from(TimeoutError()))
    assert may_pass(error_of_client(503)) and may_pass(error_of_client(429))
    assert not may_pass(error_of_client()) and not may_pass(FileNotFoundError("b/bucket"))
    assert may_pass(ValueError("UNAVAILABLE: try later"))


def test_a_reader_is_told_of_storage_and_not_of_damage():
    with pytest.raises(NoAnswer, match=r"^gs://b/1 cannot be reached \(refused\)"):
        check_answered("gs://b/1", raised_from(ConnectionRefusedError(111, "refused")))
    with pytest.raises(UserError, match=r"^gs://b/1 may not be read .*; give this user"):
        check_answered("gs://b/1", error_of_client())
    check_answered("gs://b/1", ValueError("DATA_LOSS: checkpoints/403/state lacks 401 bytes"))
