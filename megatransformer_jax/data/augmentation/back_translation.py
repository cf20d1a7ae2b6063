"""A user's function that says a text in other words, such as a translation there and back."""

import dataclasses
import functools
import importlib
import traceback
import typing
from collections.abc import Callable

from megatransformer_jax.config.option import ConfigError

OPTION = "data.augmentation.back_translation"


@dataclasses.dataclass(frozen=True)
class FailedAugmentation:
    """Stands in for a document that could not be augmented.

    It is a value and not an exception so that worker processes can hand it to the training process,
    which ends with its message.
    """

    message: str


@dataclasses.dataclass(frozen=True)
class BackTranslation:
    """Calls the function named 'package.module:name' with (text, seed).

    The function must be pure: the same text and seed give the same text in every process. It is
    imported by name in each process, so that it need not pickle.

    Raises:
      ConfigError: on construction, if there is no such function.
    """

    name: str

    def __post_init__(self) -> None:
        assert self._function is not None

    def __reduce__(self) -> tuple[typing.Any, ...]:
        return BackTranslation, (self.name,)

    @functools.cached_property
    def _function(self) -> Callable[[str, int], str]:
        return load_function(self.name)

    def apply(self, text: str, seed: int, number: int) -> str | FailedAugmentation:
        """The new text, or what went wrong.

        Args:
          text: of the document; not blank.
          seed: a 32-bit seed of this document and epoch, for the function's own draws.
          number: the document's place in the training stream, for the message.
        """
        try:
            result = self._function(text, seed)
        except Exception as error:  # Whatever the user's function raises.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return self._failure(
                f"raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})",
                text,
                number,
            )
        if not isinstance(result, str):
            return self._failure(f"returned {type(result).__name__}, not text", text, number)
        if not result.strip():
            return self._failure("returned an empty text", text, number)
        if any("\ud800" <= character <= "\udfff" for character in result):
            return self._failure("returned a lone surrogate, which is no text,", text, number)
        return result

    def _failure(self, what: str, text: str, number: int) -> FailedAugmentation:
        return FailedAugmentation(
            f"{OPTION}: {self.name} {what}, for document {number} of the training stream, which "
            f"begins {text[:60]!r}. It must return a text that is not empty; correct the function."
        )


def load_function(name: str) -> Callable[[str, int], str]:
    """The function 'package.module:name'.

    Raises:
      ConfigError: if it cannot be imported or is not callable.
    """
    module_name, _, attribute = name.partition(":")
    try:
        value: typing.Any = importlib.import_module(module_name)
    except Exception as error:  # An import runs the user's code.
        raise ConfigError(
            OPTION,
            f"{name!r}: importing {module_name} raised {type(error).__name__}: {error}. Name a "
            "module that can be imported from the folder where the run starts.",
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigError(
                OPTION, f"{name!r}: {module_name} has no {attribute}; name one of its functions."
            )
        value = getattr(value, part)
    if not callable(value):
        raise ConfigError(
            OPTION, f"{name!r} is {type(value).__name__}, not a function; name a function."
        )
    return value
