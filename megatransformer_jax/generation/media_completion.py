"""What generation with media gives back: texts, images and clips in their order."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.generation.completion import continuation_text
from megatransformer_jax.generation.media_prompt import MediaPrompt
from megatransformer_jax.generation.stop_strings import cut_at_stop
from megatransformer_jax.types import IMAGE, NO_MEDIUM


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """float32 [height, width, C] in [-1, 1]."""

    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class GeneratedClip:
    """A normalised mel spectrogram, float32 [frames, M]. `is_voice` if it was asked for as speech.

    Vocoders and `griffin_lim` make a waveform of it.
    """

    mel: np.ndarray
    is_voice: bool


GeneratedPart = str | GeneratedImage | GeneratedClip


@dataclasses.dataclass(frozen=True)
class MediaCompletion:
    """A finished continuation.

    Attributes:
      prompt: what it continues.
      parts: texts, images and clips, in the order in which they were made; no text is empty.
      token_ids: new tokens, those around media included, without an end token. A prompt's own
        opening token is none.
      score: sum of the log-probabilities of the tokens that the model chose.
      finish_reason: 'end_of_text', 'stop', 'length', or 'exhausted' if every token was banned.
    """

    prompt: MediaPrompt
    parts: tuple[GeneratedPart, ...]
    token_ids: tuple[int, ...]
    score: float
    finish_reason: str

    @property
    def text(self) -> str:
        """Its texts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[np.ndarray]:
        """Its images, see `GeneratedImage`."""
        return [part.pixels for part in self.parts if isinstance(part, GeneratedImage)]

    @property
    def mels(self) -> list[np.ndarray]:
        """Its clips, see `GeneratedClip`."""
        return [part.mel for part in self.parts if isinstance(part, GeneratedClip)]


def parts_of_ids(
    tokenizer: MediaTokenizer,
    prompt_ids: Sequence[int],
    new_ids: Sequence[int],
    images: Sequence[np.ndarray],
    mels: Sequence[np.ndarray],
    stops: Sequence[str] = (),
) -> tuple[GeneratedPart, ...]:
    """The parts that new tokens stand for.

    Args:
      tokenizer: of the model.
      prompt_ids: before them. A medium that they open at their end is the first of the new ones.
      new_ids: without an end token.
      images: that were made, in order.
      mels: the same.
      stops: texts that end a text, which are not part of it.
    """
    parts: list[GeneratedPart] = []
    left_images, left_mels = iter(images), iter(mels)
    # Text right behind the prompt's own continues it, other text begins anew.
    before: list[int] = []
    for token in prompt_ids:
        before = [] if tokenizer.marker_of(token) else [*before, int(token)]
    run: list[int] = []

    def end_run() -> None:
        text = cut_at_stop(continuation_text(tokenizer.base, before, run), stops) if run else ""
        if text:
            parts.append(text)

    for token in [*_opened_by(tokenizer, prompt_ids), *new_ids]:
        if tokenizer.marker_of(token) is None:
            run.append(int(token))
            continue
        end_run()
        before, run = [], []
        kind = tokenizer.medium_after(token)
        if kind == IMAGE:
            parts.append(GeneratedImage(next(left_images)))
        elif kind != NO_MEDIUM:
            is_voice = tokenizer.marker_of(token) == "<|VOICE|>"
            parts.append(GeneratedClip(next(left_mels), is_voice))
    end_run()
    return tuple(parts)


def _opened_by(tokenizer: MediaTokenizer, prompt_ids: Sequence[int]) -> list[int]:
    last = int(prompt_ids[-1])
    return [last] if tokenizer.medium_after(last) else []
