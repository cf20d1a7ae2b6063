"""What is imported when something first needs it: packages of extras, and functions of the user."""

import importlib
from collections.abc import Callable
from typing import Any

from megatransformer_jax.config.option import ConfigError, UserError


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


def import_function(option: str, name: str) -> Callable[..., Any]:
    """The function 'package.module:name' of a user.

    Args:
      option: that names it, for messages.
      name: as `require_function_name` demands.

    Raises:
      ConfigError: if it cannot be imported or is not callable.

    Examples:
      >>> import_function("an.option", "math:sqrt")(4)
      2.0
    """
    module_name, _, attribute = name.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # An import runs the user's code.
        raise ConfigError(
            option,
            f"{name!r}: importing {module_name} raised {type(error).__name__}: {error}. Name a "
            "module that can be imported from the folder where the run starts.",
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigError(
                option, f"{name!r}: {module_name} has no {attribute}; name one of its functions."
            )
        value = getattr(value, part)
    if not callable(value):
        raise ConfigError(
            option, f"{name!r} is {type(value).__name__}, not a function; name a function."
        )
    return value
