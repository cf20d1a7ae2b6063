"""Storage that fails, told in words: a full disk, a read-only folder, a bucket that refuses."""

import errno
import os
import re
from collections.abc import Iterator

from megatransformer_jax.config.option import TRY_AGAIN, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ESTALE)

# How TensorStore and gRPC name what went wrong; errors of files have the system's number as well.
_STATUS = re.compile(
    r"\b(?:RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED"
    r"|FAILED_PRECONDITION|ALREADY_EXISTS|NOT_FOUND|ABORTED|DATA_LOSS)\b"
)
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
# Of those and of HTTP.
_FORBIDDEN_STATUS = re.compile(
    r", 40[13]\b|PERMISSION_DENIED|UNAUTHENTICATED|AccessDenied|Forbidden"
)
# Packages that talk to buckets; their errors have no common class.
_CLIENTS = ("gcsfs", "google", "s3fs", "botocore", "aiobotocore", "aiohttp", "requests", "fsspec")

# Their errors where nobody answers, by name of the class or of one above it, and TensorStore's.
_SILENT = ("ConnectionError", "ClientConnectionError", "HTTPClientError", "TimeoutError")
_SILENT_STATUS = re.compile(r"\b(?:UNAVAILABLE|DEADLINE_EXCEEDED)\b")
_TOO_MANY, _FIRST_OF_SERVER = 429, 500  # Of HTTP.

_MAX_LENGTH = 200


class SaveFailed(UserError):
    """Something could not be written. What was saved before is whole: the run can go on later."""

    exit_code = TRY_AGAIN


class NoAnswer(UserError):
    """A bucket has not answered; it may, later."""

    exit_code = TRY_AGAIN


def storage_problem(error: BaseException) -> str | None:
    """What storage said, in a line, or None if the error is not one of storage.

    Examples:
      >>> storage_problem(OSError(28, "No space left on device", "runs/a"))
      'runs/a: No space left on device'
      >>> storage_problem(TypeError("a mistake in the program")) is None
      True
    """
    for one in chain_of(error):
        number = _number(one)
        if isinstance(one, OSError) and one.strerror:
            return f"{one.filename}: {one.strerror}" if one.filename else one.strerror
        if number:
            return os.strerror(number)
        if isinstance(one, OSError) or _is_of_client(one) or _STATUS.search(str(one)):
            return " ".join(str(one).split())[:_MAX_LENGTH] or type(one).__name__
    return None


def is_full(error: BaseException) -> bool:
    """Whether a disk is full, or may not be written to at all."""
    return any(_number(one) in (*_FULL, errno.EROFS) for one in chain_of(error))


def may_pass(error: BaseException) -> bool:
    """Whether a bucket gave no answer, or one that it is busy: another time it may.

    Examples:
      >>> may_pass(ConnectionResetError(104, "Connection reset by peer"))
      True
      >>> may_pass(PermissionError("Forbidden: b/bucket"))
      False
    """
    for one in chain_of(error):
        if any(kind.__name__ in _SILENT for kind in type(one).__mro__):
            return True
        if isinstance(one, ValueError) and _SILENT_STATUS.search(str(one)):
            return True
        code = getattr(one, "code", None)
        if isinstance(code, int) and (code == _TOO_MANY or code >= _FIRST_OF_SERVER):
            return _is_of_client(one)
    return False


def check_reached(where: str, error: BaseException) -> None:
    """As `check_answered`, but for an answer that this user may not read.

    Raises:
      NoAnswer: if the storage did not answer.
    """
    if may_pass(error):
        raise NoAnswer(
            f"{where} cannot be reached ({storage_problem(error)}); check the network of this "
            "machine, then start the same command again."
        ) from error


def check_answered(where: str, error: BaseException) -> None:
    """Tells an error that says nothing about what was to be read from one that does.

    Args:
      where: what was to be read, for the message.
      error: that reading it has raised.

    Raises:
      NoAnswer: if the storage did not answer.
      UserError: if it does not let this user read.
    """
    check_reached(where, error)
    if any(_is_forbidden(one) for one in chain_of(error)):
        raise UserError(
            f"{where} may not be read ({storage_problem(error)}); give this user the right to."
        ) from error


def fix_of(error: BaseException) -> str:
    """What to do about a problem of storage."""
    for one in chain_of(error):
        number = _number(one)
        if number in _FULL:
            return "make room there"
        if _is_forbidden(one):
            return "give this user the right to write there"
        if number in _ABSENT:
            return "put the folder back"
    return "see to the storage"


def _is_forbidden(error: BaseException) -> bool:
    number = _number(error)
    if number is not None:
        return number in _FORBIDDEN
    text = str(error)
    is_of_bucket = isinstance(error, OSError) or _is_of_client(error) or _STATUS.search(text)
    return bool(is_of_bucket and _FORBIDDEN_STATUS.search(text))


def _number(error: BaseException) -> int | None:
    """The system's number of an error, also of one that TensorStore reports."""
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def _is_of_client(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _CLIENTS


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came from, the outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        if isinstance(error, BaseExceptionGroup):
            for part in error.exceptions:
                yield from chain_of(part)
        error = error.__cause__ or error.__context__
