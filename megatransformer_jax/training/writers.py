"""Builds the configured metric writers and fans out to them."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from megatransformer_jax.config.loop import LoggingConfig
from megatransformer_jax.training.metric_interface import MetricWriter
from megatransformer_jax.training.tensorboard_writer import TensorBoardWriter
from megatransformer_jax.training.wandb_writer import WandbWriter


def build_writer(
    config: LoggingConfig,
    workdir: str | os.PathLike[str],
    *,
    is_primary: bool,
    start_step: int = 0,
) -> "MultiWriter":
    """All writers of the config as one. Only the primary process writes; the others get none.

    Args:
      config: names the writers.
      workdir: the run's directory.
      is_primary: whether this is process 0.
      start_step: first step that this (possibly resumed) run will write.

    Raises:
      ConfigError: if a writer's package is not installed.
      ValueError: if a writer's name is unknown.
    """
    if not is_primary:
        return MultiWriter(())
    writers: list[MetricWriter] = []
    for name in config.writers:
        match name:
            case "tensorboard":
                writers.append(TensorBoardWriter(os.path.join(workdir, "events"), start_step))
            case "wandb":
                assert config.wandb_project is not None  # LoggingConfig checks it
                writers.append(WandbWriter(config.wandb_project, workdir))
            case _:
                raise ValueError(f"unknown writer {name!r}; known: tensorboard, wandb")
    return MultiWriter(writers)


class MultiWriter(MetricWriter):
    """Passes every call on to each of its writers, in order."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one number per name."""
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images [H, W, C] or [N, H, W, C], uint8 or floats in [0, 1]."""
        for writer in self._writers:
            writer.write_images(step, images)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text per name."""
        for writer in self._writers:
            writer.write_texts(step, texts)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes the distribution of each array's values."""
        for writer in self._writers:
            writer.write_histograms(step, arrays, num_buckets)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes a flat mapping of hyperparameters."""
        for writer in self._writers:
            writer.write_hparams(hparams)

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Writes raw tensors."""
        for writer in self._writers:
            writer.write_summaries(step, values, metadata)

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Writes videos [N, T, H, W, C]."""
        for writer in self._writers:
            writer.write_videos(step, videos)

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Writes sound [N, T, C] in [-1, 1]."""
        for writer in self._writers:
            writer.write_audios(step, audios, sample_rate=sample_rate)

    def flush(self) -> None:
        """Flushes every writer."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes every writer."""
        for writer in self._writers:
            writer.close()
