"""Held-out rows as prompts: up to a medium that is to be made, or to a medium that is asked about.

`Generator` makes the media and gives the answers, from what stands here.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from megatransformer_jax.config.generation import GenerationConfig, MediaGenerationConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.sampling import DepthConfig
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.generation.media_prompt import (
    EncodedPrompt,
    room_for_text,
    sequence_length,
)
from megatransformer_jax.types import AUDIO, IMAGE, Batch


@dataclasses.dataclass(frozen=True)
class Question:
    """A held-out row up to where the model is to go on.

    Attributes:
      prompt: the row up to there.
      text: of the prompt.
      medium: the real one in the place of what is to be made; or what is asked about, the images
        of the row side by side or its first clip. float32 [height, width, C] or [frames, M].
      right: text that the row has there; empty if a medium is to be made.
    """

    prompt: EncodedPrompt
    text: str
    medium: np.ndarray
    right: str = ""


def rows_to_make(batches: Sequence[Batch], kind: int, tokenizer: Tokenizer) -> Iterator[Question]:
    """Rows with a medium to be made, up to the opening token of the first one.

    Args:
      batches: on the host, with media.
      kind: IMAGE or AUDIO.
      tokenizer: the model's.
    """
    for batch, row in _rows(batches):
        media, is_made = _slots(batch, row, kind)
        if is_made.any():
            slot = int(is_made.argmax())
            opening = np.flatnonzero(np.asarray(batch.media.follows[row]) == kind)[slot]
            prompt = _prompt(batch, row, int(opening) + 1)
            yield Question(prompt, tokenizer.decode(prompt.ids), media[slot])


def rows_to_answer(
    batches: Sequence[Batch], kind: int, tokenizer: Tokenizer, task: int | None = None
) -> Iterator[Question]:
    """Rows with a given medium, none of its kind to be made, and text behind the last medium.

    Args:
      batches: on the host, with media.
      kind: IMAGE or AUDIO.
      tokenizer: the model's.
      task: number of the task whose rows these are; None: of all tasks.
    """
    for batch, row in _rows(batches):
        if task is not None and batch.media.task[row] != task:
            continue
        media, is_made = _slots(batch, row, kind)
        openings = np.flatnonzero(np.asarray(batch.media.follows[row]))
        if not media or is_made.any():
            continue
        # What is right counts from the answer's start on; a question before it is given. The token
        # there predicts the answer's first, so that there must be room behind it.
        counts = np.asarray(batch.loss_mask[row]) > 0
        counts[: openings[-1] + 1] = False
        start = int(counts.argmax())
        if counts.any() and start + 1 < len(counts):
            prompt = _prompt(batch, row, start + 1)
            right = np.asarray(batch.targets[row])[counts]
            ids = [int(token) for token in right if token != tokenizer.eos_id]
            shown = np.concatenate(media, axis=1) if kind == IMAGE else media[0]
            yield Question(prompt, tokenizer.decode(prompt.ids), shown, tokenizer.decode(ids))


def answers(
    make_generator: Callable[[GenerationConfig], Generator],
    config: ModelConfig,
    questions: Sequence[Question],
    depth: int | None,
    *,
    row_length: int,
    batch_size: int | None = None,
) -> list[str]:
    """What the model says to each question, greedily and in text alone.

    Args:
      make_generator: from a configuration to a generator of the model.
      config: of the model.
      questions: at least one.
      depth: iterations of the core; None: the model has none.
      row_length: tokens that held-out rows have at most, so an answer too.
      batch_size: questions at once. None: all.
    """
    shortest = min(len(question.prompt.ids) for question in questions)
    longest = max(sequence_length(config, question.prompt) for question in questions)
    generation = GenerationConfig(
        strategy="greedy",
        max_new_tokens=min(row_length - shortest + 1, room_for_text(config, longest, 0)),
        batch_size=None if batch_size is None else min(batch_size, len(questions)),
        depth=DepthConfig(depth=depth),
        media=MediaGenerationConfig(max_media=0),
    )
    prompts = [question.prompt for question in questions]
    return [completion.text for completion in make_generator(generation).generate(prompts)]


def _rows(batches: Sequence[Batch]) -> Iterator[tuple[Any, int]]:
    """Batches and numbers of the rows that are not padding."""
    for batch in batches:
        for row in np.flatnonzero(np.asarray(batch.segment_ids).any(axis=1)).tolist():
            yield batch, row


def _slots(batch: Any, row: int, kind: int) -> tuple[list[np.ndarray], np.ndarray]:
    """A row's media of a kind, and which of them are to be made."""
    media = batch.media
    if kind == IMAGE:
        if media.images is None:
            return [], np.zeros(0, bool)
        count = int(np.sum(media.is_image[row]))
        return list(np.asarray(media.images[row][:count])), np.asarray(media.is_drawn[row][:count])
    if media.mels is None:
        return [], np.zeros(0, bool)
    lengths = np.asarray(media.mel_lengths[row])
    count = int(np.sum(lengths > 0))
    mels = [np.asarray(media.mels[row][slot][: lengths[slot]]) for slot in range(count)]
    return mels, np.asarray(media.is_spoken[row][:count])


def _prompt(batch: Any, row: int, length: int) -> EncodedPrompt:
    """The first tokens of a row, and the media between them."""
    before = np.asarray(batch.media.follows[row])[: length - 1]
    images, mels = (
        _slots(batch, row, kind)[0][: int(np.sum(before == kind))] for kind in (IMAGE, AUDIO)
    )
    ids = tuple(np.asarray(batch.tokens[row])[:length].tolist())
    return EncodedPrompt(ids, tuple(images), tuple(mels))
