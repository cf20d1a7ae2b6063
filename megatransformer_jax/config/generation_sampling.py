"""Generation: what is done to the scores of the next token, as a frozen dataclass."""

import dataclasses
from collections.abc import Sequence

from megatransformer_jax.config.option import (
    MAX_COUNT,
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What is done to the scores of the next token before one is chosen."""

    temperature: float = option(
        1.0,
        "Divides the scores. Below 1 favours likely tokens, above 1 evens out. 0: the likeliest "
        "token, with strategy speculative or parallel.",
        minimum=0,
    )
    top_k: int | None = option(
        None, "Keeps this many of the likeliest tokens.", minimum=1, maximum=MAX_COUNT
    )
    top_p: float | None = option(
        None,
        "Keeps the likeliest tokens whose probabilities first add up to this (arXiv 1904.09751).",
        above=0,
        maximum=1,
    )
    min_p: float | None = option(
        None,
        "Keeps tokens of at least this fraction of the likeliest one's probability "
        "(arXiv 2407.01082).",
        above=0,
        maximum=1,
    )
    typical_p: float | None = option(
        None,
        "Keeps the tokens whose information is nearest to the entropy, up to this probability "
        "(arXiv 2202.00666).",
        above=0,
        maximum=1,
    )
    repetition_penalty: float = option(
        1.0,
        "Divides positive scores of tokens that occurred, in the prompt too, and multiplies "
        "negative ones (arXiv 1909.05858). 1: none.",
        above=0,
    )
    presence_penalty: float = option(
        0.0, "Taken off the score of a token that has been generated before."
    )
    frequency_penalty: float = option(
        0.0, "Taken off the score of a token as often as it has been generated before."
    )
    no_repeat_ngram: int | None = option(
        None,
        "No run of this many tokens occurs twice. None: no limit.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    banned_words: tuple[str, ...] = option((), "Texts that are never generated.")
    forced_words: tuple[str, ...] = option((), "Texts that each continuation contains.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("top_k", "top_p", "min_p", "typical_p")
    def _cuts_need_draws(self) -> None:
        """Not given with temperature=0."""
        if self.temperature == 0:
            require_defaults(
                self,
                ("top_k", "top_p", "min_p", "typical_p"),
                "with temperature=0, which takes the likeliest token",
                "raise temperature",
            )

    @rule("banned_words", "forced_words")
    def _words_have_text(self) -> None:
        """No empty text, only UTF-8."""
        for name in ("banned_words", "forced_words"):
            check_texts(name, getattr(self, name))

    @rule("forced_words")
    def _no_word_is_banned_and_forced(self) -> None:
        """Contain none of banned_words."""
        for forced in self.forced_words:
            for banned in self.banned_words:
                if banned in forced:
                    raise ConfigError(
                        "forced_words", f"{forced!r} contains the banned {banned!r}; drop one."
                    )


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Checks that no text of an option is empty or cannot be encoded.

    Raises:
      ConfigError: if one is.
    """
    if "" in texts:
        raise ConfigError(
            name, f"{tuple(texts)!r} has an empty text, which occurs everywhere; remove it."
        )
    check_encodable(name, texts)


def check_encodable(name: str, texts: Sequence[str]) -> None:
    """Checks that texts can be written in UTF-8.

    Raises:
      ConfigError: if one has a lone surrogate; a command line has them for bytes that are no text.
    """
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                name,
                f"{text!r} has {text[error.start]!r} at character {error.start}, which is no text; "
                "write it in UTF-8.",
            ) from error
