"""Where files are: paths of this machine and of buckets, and files that are written whole.

A path in a bucket (`gs://`, `s3://`) has the methods of a `pathlib.Path`. What those do not say
well about buckets is here: making folders, sizes, patterns, ranges of bytes.
"""

import fcntl
import json
import logging
import os
import pathlib
import re
import tempfile
import typing
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging as absl_logging

from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.extras import import_extra
from megatransformer_jax.failures import check_reached

if typing.TYPE_CHECKING:
    AnyPath = pathlib.Path
else:
    # What paths of this machine and those of buckets (`etils.epath`) have in common.
    AnyPath = pathlib.PurePosixPath

# ------------------------------------------------------------------------------
# Paths that options name.

# By scheme: the package that reads it, and the extra of setup.py that brings it.
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
BUCKETS = tuple(_PACKAGES)
# Those that Orbax writes checkpoints to.
CHECKPOINTS = ("gs",)
# Two letters at least: C:/ is a drive.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]+):(?P<slashes>/+)(?P<rest>.*)", re.DOTALL)
# What to do where a bucket is not served, after a semicolon.
NO_CHECKPOINTS = (
    "Orbax neither writes nor reads checkpoints there yet; use gs://, a bucket that is mounted as "
    "a folder, or a folder of this machine, for which logging.mirror keeps a copy of all else"
)
_MOUNT = "mount the bucket (gcsfuse, s3fs-fuse), or copy it, and name the folder here"


def is_bucket_path(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of a bucket.

    Examples:
      >>> is_bucket_path("gs://bucket/run"), is_bucket_path("runs/a")
      (True, False)
    """
    return _scheme(os.fspath(path)) is not None


def check_served(
    option: str, value: Any, served: Sequence[str] = BUCKETS, instead: str = _MOUNT
) -> None:
    """Checks that a path is of this machine or of a bucket that is served there; looks at no file.

    Args:
      option: that names it, for messages.
      value: the path.
      served: schemes of `BUCKETS`. Empty: only paths of this machine.
      instead: what to do about a bucket of another scheme.

    Raises:
      ConfigError: if it is neither, empty, or no path at all.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ConfigError(option, f"{value!r} is not a path; give the name of a folder.")
    text = os.fspath(value)
    scheme = _scheme(text)
    if scheme is None:
        return
    if scheme in BUCKETS and scheme not in served:
        raise ConfigError(option, f"{text!r}: {scheme}:// is not served here; {instead}.")
    known = [f"{name}://BUCKET/PATH" for name in served]
    if scheme not in BUCKETS:
        raise ConfigError(
            option,
            f"{text!r}: {scheme}:// is not served; give {' or '.join(['a path', *known])}.",
        )
    match = _ADDRESS.fullmatch(text)
    assert match is not None  # It has a scheme.
    if match["slashes"] != "//":
        raise ConfigError(
            option,
            f"{text!r} is not an address: it has lost or gained a slash, as pathlib.Path does to "
            f"it. Give it as text, {scheme + '://' + match['rest']!r}.",
        )
    if not match["rest"].strip("/"):
        raise ConfigError(option, f"{text!r} names no bucket; give {' or '.join(known)}.")


def as_path(
    option: str, value: Any, served: Sequence[str] = BUCKETS, instead: str = _MOUNT
) -> AnyPath:
    """The path that an option or argument names, with ~ as the user's home.

    Args:
      option: see `check_served`, as the others.
      value: the path.
      served: of buckets.
      instead: what to do.

    Returns:
      A `pathlib.Path`, or a path of `etils.epath` for a bucket. The latter must not be made
      absolute: see `absolute`.

    Raises:
      ConfigError: as `check_served`.
      UserError: if the package for such a bucket is not installed.

    Examples:
      >>> as_path("workdir", "runs/a").name
      'a'
    """
    check_served(option, value, served, instead)
    text = os.fspath(value)
    scheme = _scheme(text)
    if scheme is None:
        return pathlib.Path(text).expanduser()
    import_extra(*_PACKAGES[scheme], f"{option}={text!r}")
    # It logs tracebacks of errors that it also raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    # Only buckets need it.
    from etils import epath  # noqa: PLC0415

    return epath.Path(text.rstrip("/"))


def local_path(option: str, value: Any, instead: str = _MOUNT) -> pathlib.Path:
    """As `as_path` where no bucket is served.

    Raises:
      ConfigError: for a path of a bucket, an empty one, or none at all.
    """
    return as_path(option, value, (), instead)


def absolute(path: AnyPath) -> AnyPath:
    """The path from the root on; one of a bucket is that already."""
    return path if is_bucket_path(path) else pathlib.Path(path).absolute()


def _scheme(text: str) -> str | None:
    """The scheme of an address; also of one that `pathlib.Path` has taken a slash from."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return None
    scheme = match["scheme"].lower()
    return scheme if len(match["slashes"]) > 1 or scheme in BUCKETS else None


# ------------------------------------------------------------------------------
# Folders.


def make_and_probe(option: str, path: AnyPath) -> AnyPath:
    """Makes a folder if it is absent, and writes into it; returns it as an absolute path.

    Raises:
      ConfigError: if it cannot be made or written to.
      NoAnswer: if its bucket does not answer.
    """
    folder = absolute(path)
    try:
        if is_bucket_path(folder):
            # There are no empty folders in a bucket; whether it can be written to shows an object.
            probe, content = folder / f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex
            write_atomically(probe, content)
            if probe.read_bytes() != content.encode():
                raise OSError("an object that was written reads back otherwise")
            probe.unlink()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise _unwritable(option, path, error) from error
    except Exception as error:
        if not is_bucket_path(folder):
            raise
        # Clients of buckets have errors of their own: of HTTP, of credentials.
        raise _unwritable(option, path, error) from error
    return folder


def _unwritable(option: str, path: AnyPath, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or first_line(error)
    fix = "choose another folder"
    if is_bucket_path(path):
        check_reached(f"{option}: {str(path)!r}", error)
        fix = "check the bucket's name, that it exists, and the credentials of this machine"
    return ConfigError(option, f"{str(path)!r} cannot be written to ({reason}); {fix}.")


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of what it says."""
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


def check_reachable(option: str, path: AnyPath) -> None:
    """Asks a bucket for a path, so that wrong names and credentials are told at once.

    Whether the path is there is not checked, nor is anything about paths of this machine.

    Raises:
      ConfigError: if the bucket is not there, or not for this machine.
      NoAnswer: if it does not answer.
    """
    if not is_bucket_path(path):
        return
    try:
        path.exists()
    except Exception as error:  # Of the client: of HTTP, of credentials.
        check_reached(f"{option}: {str(path)!r}", error)
        raise ConfigError(
            option,
            f"{str(path)!r} cannot be read ({first_line(error)}); check the bucket's name and the "
            "credentials of this machine.",
        ) from error


def tree_bytes(folder: AnyPath) -> int:
    """Bytes of all files below a folder."""
    if is_bucket_path(folder):
        return int(file_system(folder).du(os.fspath(folder), total=True))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def files_below(folder: AnyPath) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted."""
    if not is_bucket_path(folder):
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    start = os.fspath(folder).partition("://")[2].rstrip("/") + "/"
    found = file_system(folder).find(os.fspath(folder))
    return sorted(name.removeprefix(start) for name in found)


def write_into(
    folder: AnyPath, write: Callable[[pathlib.Path], Sequence[pathlib.Path]]
) -> list[AnyPath]:
    """Lets a function write files into a folder, which may be in a bucket.

    Args:
      folder: exists, or is in a bucket.
      write: from a folder of this machine to the files that it has written there.

    Returns:
      Where these files are.
    """
    if not is_bucket_path(folder):
        return list(write(folder))
    with tempfile.TemporaryDirectory() as local:
        named = write(pathlib.Path(local))
        for name in files_below(pathlib.Path(local)):
            write_atomically(folder / name, pathlib.Path(local, name).read_bytes())
        return [folder / path.relative_to(local) for path in named]


def lock_opened(descriptor: int, path: pathlib.Path, *, taken: str, otherwise: str) -> None:
    """Locks a file or folder of this machine until its descriptor is closed, or the process ends.

    Args:
      descriptor: of the opened file or folder.
      path: of it, for messages.
      taken: what to say if another process has locked it.
      otherwise: what to see to where the file system has no locks, which is a warning.

    Raises:
      UserError: if another process has locked it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(taken) from error
    except OSError as error:  # Some network file systems have no locks.
        absl_logging.warning("%s cannot be locked (%s): %s.", path, error.strerror, otherwise)


# ------------------------------------------------------------------------------
# What is in buckets, by fsspec.


def file_system(path: str | os.PathLike[str]) -> Any:
    """The fsspec file system of a bucket's path: the one that its methods use.

    A client remembers listings, until it writes itself. With one client for all, what was written
    here is seen here.
    """
    # It brings asyncio's machinery, which local runs do not need.
    from etils.epath import backend  # noqa: PLC0415

    return backend.fsspec_backend.fs(os.fspath(path))


def forget_listings(path: str | os.PathLike[str]) -> None:
    """Asks a bucket again what is in it next time: others may have written there."""
    if is_bucket_path(path):
        file_system(path).invalidate_cache()


# ------------------------------------------------------------------------------
# Files that a reader, or a start after a crash, finds whole or not at all.

# As files are that people make; a temporary one is private to its maker.
_MODE = 0o644


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a file, and the folders above it; an older file stays until the new one is whole.

    In a bucket it is one object, which appears when all of it has arrived.

    Args:
      path: of the file.
      content: bytes, or text, which is written in UTF-8.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_bucket_path(path):
        file_system(path).pipe_file(os.fspath(path), content)
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _MODE)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def make_readable(path: str | os.PathLike[str]) -> None:
    """Gives a finished file the mode of other files.

    Libraries that write through a temporary file, as safetensors does, leave it private.
    """
    os.chmod(path, _MODE)


def write_json(path: str | os.PathLike[str], values: Any) -> None:
    """Writes values as indented JSON. Numbers that are not finite become NaN and Infinity.

    Examples:
      >>> write_json(folder / "a.json", {"loss": 2.5})
      >>> (folder / "a.json").read_text()
      '{\\n  "loss": 2.5\\n}\\n'
    """
    write_atomically(path, json.dumps(values, indent=2) + "\n")
