"""Reads one line of a JSON Lines file."""

import json
from typing import Any

from megatransformer_jax.config.option import UserError


def json_object(line: str, where: str, form: str) -> dict[str, Any]:
    """The object that a line holds.

    Args:
      line: the text.
      where: file and line, for the error.
      form: says how a line should look, for the error.

    Raises:
      UserError: if the line is no JSON, or no object.
    """
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); {form}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object; {form}")
    return record
