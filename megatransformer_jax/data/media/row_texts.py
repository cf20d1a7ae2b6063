"""Changes of the texts of training rows with media, as `data.augmentation` says.

Words are changed before they are tokenised, in prompts, captions and plain text. A row with sound
keeps its words, as a transcript says what can be heard, and so does one with given text, as its
answer is that of the question. Tokens are hidden in all texts, but not the
start token and those around media.
"""

import dataclasses

import numpy as np

from megatransformer_jax.config.data import AugmentationConfig, DataConfig
from megatransformer_jax.data.augmentation.text import (
    FailedAugmentation,
    TextAugmentation,
    TokenDropout,
    ids_to_read,
)
from megatransformer_jax.data.media.encoding import EncodedSample
from megatransformer_jax.data.media.records import AudioPart, Given, Part, Sample

# Texts of a row beyond the first draw as rows would whose numbers no run reaches.
_NEXT_TEXT = 1 << 40


class RowTexts:
    """Changes texts of rows; the same for a row in every process and resumed run.

    Args:
      config: with source='media'.
      hidden_id: what the model reads in place of a hidden token.

    Raises:
      ConfigError: if the file of synonyms or the function cannot be used.
    """

    def __init__(self, config: DataConfig, hidden_id: int):
        options: AugmentationConfig = config.augmentation
        self._words = (
            TextAugmentation.from_config(options, config.seed) if options.changes_text else None
        )
        self._dropout = TokenDropout(options.token_dropout, config.seed)
        self._hidden_id = hidden_id

    @property
    def changes_words(self) -> bool:
        """Whether texts change before they are tokenised."""
        return self._words is not None

    def change(self, text: str, number: int) -> str | FailedAugmentation:
        """The text of row `number` in other words."""
        if self._words is None:
            return text
        changed: str | FailedAugmentation = self._words.map_with_index(number, text)
        return changed

    def change_sample(self, sample: Sample, number: int) -> Sample | FailedAugmentation:
        """The sample of row `number` with its texts in other words, unless it has sound or given
        text."""
        if self._words is None or any(isinstance(part, AudioPart | Given) for part in sample.parts):
            return sample
        parts: list[Part | Given] = []
        for part in sample.parts:
            changed: Part | Given | FailedAugmentation = part
            if isinstance(part, str):
                changed = self.change(part, number)
                number += _NEXT_TEXT
            if isinstance(changed, FailedAugmentation):
                return changed
            parts.append(changed)
        return dataclasses.replace(sample, parts=tuple(parts))

    def hide(self, row: EncodedSample, number: int) -> EncodedSample:
        """Row `number` with some of its tokens hidden where they are read."""
        if not self._dropout.rate:
            return row
        hidden = self._dropout.map_with_index(number, row.tokens)
        is_opening = row.follows > 0
        is_closing = np.concatenate(([False], is_opening[:-1]))
        is_start = np.arange(len(row.tokens)) == 0
        tokens = np.where(
            is_opening | is_closing | is_start, row.tokens, ids_to_read(hidden, self._hidden_id)
        )
        return dataclasses.replace(row, tokens=tokens.astype(np.int32))
