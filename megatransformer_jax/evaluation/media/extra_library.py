"""Imports libraries of the extra 'eval' when a score that needs one is asked for."""

import importlib
from typing import Any

from megatransformer_jax.config.option import UserError


def import_for_scores(name: str, score: str) -> Any:
    """The module `name`.

    Args:
      name: of the module.
      score: what needs it, for the error.

    Raises:
      UserError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{score} needs the library {name.partition('.')[0]}; install the extra 'eval': "
            "pip install -e .[eval]."
        ) from error
