"""Random changes of training documents: words before they are tokenised, tokens after.

Words are replaced by synonyms from a user's file, or a user's function says the text in other
words; tokens are hidden where they are read, but not where they are predicted.
"""

import dataclasses
import functools
import re
import traceback
import typing
from collections.abc import Callable, Mapping

import grain
import numpy as np

from megatransformer_jax.config.data import AugmentationConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.extras import import_function
from megatransformer_jax.storage import as_path
from megatransformer_jax.streams import Purpose, generator_of

# ------------------------------------------------------------------------------
# Words replaced by synonyms from a user's file.

SYNONYMS_OPTION = "data.augmentation.synonyms_file"
# Letters and digits, with apostrophes and hyphens inside: "don't" and "well-known" are one word.
WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


@dataclasses.dataclass(frozen=True)
class Synonyms:
    """A table of words, in lower case, and their synonyms."""

    table: Mapping[str, tuple[str, ...]]

    def replace(self, text: str, rate: float, rng: np.random.Generator) -> str:
        """The text with each word that the table has replaced with probability `rate`.

        Only whole words are replaced. A word in capitals gets a synonym in capitals, one with a
        capital letter at its start gets a synonym with one; otherwise it is as in the table.
        """

        def choose(match: re.Match[str]) -> str:
            synonyms = self.table.get(match[0].lower())
            if synonyms is None or rng.random() >= rate:
                return match[0]
            return in_case_of(match[0], synonyms[int(rng.integers(len(synonyms)))])

        return WORD.sub(choose, text)


def in_case_of(word: str, synonym: str) -> str:
    """The synonym with capitals where the word has them."""
    if len(word) > 1 and word.isupper():
        return synonym.upper()
    if word[:1].isupper():
        return synonym[:1].upper() + synonym[1:]
    return synonym


def read_synonyms(path: str) -> Synonyms:
    """Reads a file of lines 'word<TAB>synonym,synonym'.

    Blank lines and lines that start with '#' are passed over. Words are compared without regard to
    capitals. A synonym may have several words; whitespace around it is dropped.

    Raises:
      ConfigError: if the file cannot be read, or naming the line that is not of this form.
    """
    try:
        text = as_path(SYNONYMS_OPTION, path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        is_encoding = isinstance(error, UnicodeDecodeError)
        reason = "it is not UTF-8" if is_encoding else getattr(error, "strerror", None) or error
        raise ConfigError(
            SYNONYMS_OPTION, f"{path!r} cannot be read ({reason}); name a UTF-8 text file."
        ) from error
    table: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition("\t")
        synonyms = tuple(part.strip() for part in rest.split(","))
        problem = _problem(word.strip(), synonyms, table)
        if problem is not None:
            raise ConfigError(
                SYNONYMS_OPTION,
                f"{path}, line {number}: {problem}. A line is a word, a tab, and its synonyms "
                "with commas between them.",
            )
        table[word.strip().lower()] = synonyms
    if not table:
        raise ConfigError(
            SYNONYMS_OPTION, f"{path} holds no word; add lines 'word<TAB>synonym,synonym'."
        )
    return Synonyms(table)


def _problem(
    word: str, synonyms: tuple[str, ...], table: Mapping[str, tuple[str, ...]]
) -> str | None:
    if not WORD.fullmatch(word):
        return f"{word!r} is not one word"
    if not all(synonyms):
        return f"{word!r} has an empty synonym, or none"
    if word.lower() in table:
        return f"{word!r} is there twice"
    return None


# ------------------------------------------------------------------------------
# A user's function that says a text in other words, such as a translation there and back.

BACK_TRANSLATION_OPTION = "data.augmentation.back_translation"


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
        return import_function(BACK_TRANSLATION_OPTION, self.name)

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
            return self._failure("returned a lone surrogate, which is not text,", text, number)
        return result

    def _failure(self, what: str, text: str, number: int) -> FailedAugmentation:
        return FailedAugmentation(
            f"{BACK_TRANSLATION_OPTION}: {self.name} {what}, for document {number} of the training "
            f"stream, which begins {text[:60]!r}. It must return a text that is not empty; "
            "correct the function."
        )


# ------------------------------------------------------------------------------
# A document's text before it is tokenised.


@dataclasses.dataclass(frozen=True)
class TextAugmentation(grain.transforms.MapWithIndex):
    """Back-translation, then synonyms. What is not text (a bad record) passes as it is.

    Attributes:
      seed: `data.seed`.
      synonyms: None: no words are replaced.
      synonym_rate: probability of a word that `synonyms` has.
      back_translation: None: no document is translated.
      back_translation_rate: probability of a document.
    """

    seed: int
    synonyms: Synonyms | None
    synonym_rate: float
    back_translation: BackTranslation | None
    back_translation_rate: float

    @classmethod
    def from_config(cls, config: AugmentationConfig, seed: int) -> "TextAugmentation":
        """Reads the file and imports the function.

        Raises:
          ConfigError: if either cannot be used.
        """
        file, function = config.synonyms_file, config.back_translation
        return cls(
            seed=seed,
            synonyms=None if file is None else read_synonyms(file),
            synonym_rate=config.synonym_rate,
            back_translation=None if function is None else BackTranslation(function),
            back_translation_rate=config.back_translation_rate,
        )

    def map_with_index(self, index: int, element: typing.Any) -> typing.Any:
        """The document's text as this epoch has it; `index` is the document's number."""
        if not isinstance(element, str) or not element.strip():
            return element
        text: str | FailedAugmentation = element
        if self.back_translation is not None:
            rng = generator_of(self.seed, index, Purpose.BACK_TRANSLATION)
            if rng.random() < self.back_translation_rate:
                seed = int(rng.integers(1 << 32, dtype=np.uint64))
                text = self.back_translation.apply(element, seed, index)
        if self.synonyms is None or isinstance(text, FailedAugmentation):
            return text
        rng = generator_of(self.seed, index, Purpose.SYNONYMS)
        return self.synonyms.replace(text, self.synonym_rate, rng)


# ------------------------------------------------------------------------------
# Hides tokens of a document where they are read, but not where they are predicted.
#
# Word dropout in the input (Bowman et al., arXiv 1511.06349, section 3.1): the model must guess
# from what is left of the context. Only tokens of documents are hidden, so never a start token.
#
# A hidden token t travels as its complement ~t, which is negative. So a document stays one array,
# and packing splits and counts it as any other.


@dataclasses.dataclass(frozen=True)
class TokenDropout(grain.transforms.MapWithIndex):
    """Hides each token with a probability. What is not an array (a bad record) passes as it is.

    Attributes:
      rate: the probability.
      seed: `data.seed`.
    """

    rate: float
    seed: int

    def map_with_index(self, index: int, element: typing.Any) -> typing.Any:
        """Token ids int32 [n], some of them hidden; `index` is the document's number."""
        if not isinstance(element, np.ndarray):
            return element
        draws = generator_of(self.seed, index, Purpose.TOKEN_DROPOUT).random(len(element))
        return np.where(draws < self.rate, ~element, element)


def ids_to_read(document: np.ndarray, hidden_id: int) -> np.ndarray:
    """The ids that the model reads: `hidden_id` in place of hidden tokens."""
    return np.where(document < 0, hidden_id, document)


def ids_to_predict(document: np.ndarray) -> np.ndarray:
    """The ids that the model predicts: those of the text, hidden or not."""
    return np.where(document < 0, ~document, document)
