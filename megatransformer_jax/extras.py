"""Packages that the base install leaves out, imported when something first needs one."""

import importlib
from typing import Any

from megatransformer_jax.config.option import UserError


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """The module `module` of a package that the extra `extra` of setup.py brings.

    Args:
      module: its name, as in an import statement.
      extra: of setup.py.
      purpose: what needs it, as the beginning of a sentence: "sounds", "data.source='tfds'".

    Raises:
      UserError: if the package, or one that it needs itself, is not installed.

    Examples:
      >>> import_extra("json", "media", "an example").dumps([1])
      '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose}: {module.partition('.')[0]} cannot be imported ({error}); install the "
            f"extra '{extra}': pip install 'megatransformer_jax[{extra}]', or pip install -e "
            f"'.[{extra}]' in a checkout."
        ) from error
