"""Replaces words by synonyms from a user's file."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from megatransformer_jax.config.option import ConfigError

OPTION = "data.augmentation.synonyms_file"
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
    capitals. A synonym may have several words; blanks around it are dropped.

    Raises:
      ConfigError: if the file cannot be read, or naming the line that is not of this form.
    """
    try:
        text = pathlib.Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(
            OPTION, f"{path!r} cannot be read ({reason}); name a UTF-8 text file."
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
                OPTION,
                f"{path}, line {number}: {problem}. A line is a word, a tab, and its synonyms "
                "with commas between them.",
            )
        table[word.strip().lower()] = synonyms
    if not table:
        raise ConfigError(OPTION, f"{path} holds no word; add lines 'word<TAB>synonym,synonym'.")
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
