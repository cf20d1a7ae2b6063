"""Tasks: how a record becomes a sample, and which task each row has."""

import itertools

import numpy as np

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.media_data import AUDIO_TASKS, IMAGE_TASKS
from megatransformer_jax.data.media.records import AudioRecord, ImageRecord
from megatransformer_jax.data.media.sample import AudioPart, ImagePart, Sample


def task_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the tasks that rows may have, in the order of their numbers in `MediaBatch.task`."""
    return tuple(config.media.task_weights)


def source_of(task: str) -> str:
    """'images', 'audio' or 'text': where a task's records come from."""
    if task in IMAGE_TASKS:
        return "images"
    return "audio" if task in AUDIO_TASKS else "text"


def image_sample(
    task: str, record: ImageRecord, pixels: np.ndarray, rng: np.random.Generator
) -> Sample:
    """draw: a prompt, then the image as a target. caption: the image, then a caption.

    Args:
      task: 'draw' or 'caption'.
      record: the texts are drawn from its.
      pixels: the record's, or changed.
      rng: makes one draw.
    """
    texts = record.prompts if task == "draw" else record.captions
    text = texts[int(rng.integers(len(texts)))]
    image = ImagePart(pixels, is_target=task == "draw")
    return Sample((text, image) if task == "draw" else (image, text), record.where)


def audio_sample(task: str, record: AudioRecord, mel: np.ndarray) -> Sample:
    """speak: the transcript, then the clip as a target. transcribe: the clip, then its transcript.

    Args:
      task: 'speak' or 'transcribe'.
      record: the transcript is its.
      mel: its spectrogram, normalised, or one of a changed clip.
    """
    clip = AudioPart(record.waveform, record.sample_rate_hz, record.is_voice, task == "speak", mel)
    parts = (record.transcript, clip) if task == "speak" else (clip, record.transcript)
    return Sample(parts, record.where)


def batch_tasks(weights: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the tasks of a batch's rows, int [batch_size].

    Systematic sampling: each task has its share of the rows in proportion to `weights`, rounded up
    or down so that the mean over batches is the share. No task is starved by bad luck.
    """
    bounds = np.cumsum(weights) / np.sum(weights)
    places = (np.arange(batch_size) + rng.random()) / batch_size
    tasks = np.minimum(np.searchsorted(bounds, places, side="right"), len(weights) - 1)
    return rng.permutation(tasks)


def validation_rows(sizes: list[int]) -> list[tuple[int, int]]:
    """Task number and record of each row of one pass over `sizes[task]` records of each task.

    Tasks take turns, so that the first rows are balanced, until one has no more records.
    """
    turns = itertools.zip_longest(*([(task, n) for n in range(s)] for task, s in enumerate(sizes)))
    return [row for turn in turns for row in turn if row is not None]
