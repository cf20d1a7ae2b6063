"""Random changes of the training texts, as a frozen dataclass."""

import dataclasses

from megatransformer_jax.config.option import ConfigError, check_options, option, rule


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """Changes of the documents of the training split, drawn anew each epoch from data.seed.

    Validation and the training of a tokenizer see the documents as they are.
    """

    token_dropout: float = option(
        0.0,
        "Probability that a token is hidden where it is read: the padding token stands there. It "
        "is predicted all the same. 0: off.",
        minimum=0,
        below=1,
    )
    synonyms_file: str | None = option(
        None, "UTF-8 file of lines 'word<TAB>synonym,synonym'. Goes with synonym_rate."
    )
    synonym_rate: float = option(
        0.0,
        "Probability that a word that synonyms_file has is replaced by one of its synonyms.",
        minimum=0,
        maximum=1,
    )
    back_translation: str | None = option(
        None,
        "A function 'package.module:name' from (text, seed) to another text that says the same. "
        "Goes with back_translation_rate.",
    )
    back_translation_rate: float = option(
        0.0, "Share of the documents that the function is given.", minimum=0, maximum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def changes_text(self) -> bool:
        """Whether documents change before they are tokenised."""
        return self.synonyms_file is not None or self.back_translation is not None

    @rule("synonyms_file", "synonym_rate")
    def _synonyms_need_file_and_rate(self) -> None:
        """Both given, or neither."""
        self._both("synonyms_file", "synonym_rate")

    @rule("back_translation", "back_translation_rate")
    def _back_translation_needs_function_and_rate(self) -> None:
        """Both given, or neither."""
        self._both("back_translation", "back_translation_rate")

    @rule("back_translation")
    def _function_has_module_and_name(self) -> None:
        """Written 'package.module:name'."""
        if self.back_translation is None:
            return
        module, _, name = self.back_translation.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
            raise ConfigError(
                "back_translation",
                f"{self.back_translation!r} names no function; write 'package.module:name'.",
            )

    def _both(self, what: str, rate: str) -> None:
        given = getattr(self, what) is not None
        if given != (getattr(self, rate) > 0):
            fix = f"set {rate} above 0" if given else f"give {what}"
            raise ConfigError(
                rate,
                f"{getattr(self, rate)!r} does not go with {what}={getattr(self, what)!r}; {fix}, "
                "or leave both out.",
            )
