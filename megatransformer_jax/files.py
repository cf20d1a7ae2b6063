"""Writing files so that a reader, or a start after a crash, finds the whole file or none."""

import json
import os
import pathlib
import tempfile
from typing import Any

# As files are that people make; a temporary one is private to its maker.
_MODE = 0o644


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a file, and the folders above it; an older file stays until the new one is whole.

    Args:
      path: of the file.
      content: bytes, or text, which is written in UTF-8.
    """
    path = pathlib.Path(path)
    content = content.encode() if isinstance(content, str) else content
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
