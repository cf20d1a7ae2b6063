"""Changes the text of a training document before it is tokenised."""

import dataclasses
import typing

import grain
import numpy as np

from megatransformer_jax.config.data import AugmentationConfig
from megatransformer_jax.data.augmentation.back_translation import (
    BackTranslation,
    FailedAugmentation,
)
from megatransformer_jax.data.augmentation.random_draws import Purpose, generator_of
from megatransformer_jax.data.augmentation.synonyms import Synonyms, read_synonyms


@dataclasses.dataclass(frozen=True)
class TextAugmentation(grain.transforms.MapWithIndex):
    """Back-translation, then synonyms. What is no text (a bad record) passes as it is.

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
