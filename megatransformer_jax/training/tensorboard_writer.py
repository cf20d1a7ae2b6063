"""Writes metrics as TensorBoard events, without TensorFlow."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorboardX
from tensorboardX import summary

from megatransformer_jax.training.media_values import audio_batch, image_batch
from megatransformer_jax.training.metric_interface import VideoFreeWriter


class TensorBoardWriter(VideoFreeWriter):
    """clu's interface over tensorboardX: numbers, images, sound, texts, histograms, options.

    Args:
      directory: where the event file goes.
      start_step: first step that will be written. Events of an earlier, interrupted run from
        this step on are hidden by TensorBoard.
    """

    def __init__(self, directory: str | os.PathLike[str], start_step: int = 0):
        purge_step = start_step if start_step > 0 else None
        self._writer = tensorboardX.SummaryWriter(
            os.fspath(directory),
            purge_step=purge_step,
            # The rest of the name is the second, which two quick starts may share.
            filename_suffix=f".{start_step:08d}",
        )

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one number per name."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images [H, W, C] or [N, H, W, C], uint8 or floats in [0, 1]."""
        for name, image in images.items():
            batch = image_batch(name, image)
            for tag, single in zip(
                _tags(name, np.ndim(image) == 3, len(batch)), batch, strict=True
            ):
                self._writer.add_image(tag, single, step, dataformats="HWC")

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Writes sound [N, T, C] in [-1, 1], 1 or 2 channels."""
        for name, clips in audios.items():
            batch = audio_batch(name, clips)
            for tag, clip in zip(_tags(name, len(batch) == 1, len(batch)), batch, strict=True):
                self._writer.add_audio(tag, clip, step, sample_rate=sample_rate)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one Markdown text per name."""
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes the distribution of each array's values."""
        for name, array in arrays.items():
            bins: Any = (num_buckets or {}).get(name, "tensorflow")
            self._writer.add_histogram(name, np.asarray(array), step, bins=bins)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes a flat mapping; values that TensorBoard has no type for are written as text."""
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in hparams.items()
        }
        for event in summary.hparams(plain, {}):
            self._writer.file_writer.add_summary(event)

    def flush(self) -> None:
        """Hands everything written so far to the file system."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


def _tags(name: str, is_single: bool, count: int) -> list[str]:
    """A tag is one picture or clip."""
    return [name] if is_single else [f"{name}/{index}" for index in range(count)]
