"""Writes metrics to Weights & Biases (extra `wandb`)."""

import html
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.training.media_values import audio_batch, image_batch
from megatransformer_jax.training.metric_interface import VideoFreeWriter


class WandbWriter(VideoFreeWriter):
    """clu's interface over one W&B run; a resumed workdir continues its W&B run.

    Args:
      project: W&B project.
      directory: the run's workdir; the W&B run id is kept in it.

    Raises:
      ConfigError: if the package wandb is not installed.
    """

    def __init__(self, project: str, directory: str | os.PathLike[str]):
        try:
            import wandb  # noqa: PLC0415 (an extra: imported only when asked for)
        except ImportError as error:
            raise ConfigError(
                "logging.writers",
                "'wandb' needs the package wandb, which is not installed; run "
                "`pip install -e .[wandb]` in the checkout, or drop it from the writers.",
            ) from error
        self._wandb = wandb
        run_id = _run_id(os.path.join(os.fspath(directory), "wandb_run_id.txt"), wandb)
        self._run = wandb.init(project=project, dir=os.fspath(directory), id=run_id, resume="allow")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one number per name."""
        self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images [H, W, C] or [N, H, W, C], uint8 or floats in [0, 1]."""
        entries = {
            name: [self._wandb.Image(single) for single in image_batch(name, image)]
            for name, image in images.items()
        }
        self._run.log(entries, step=step)

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Writes sound [N, T, C] in [-1, 1], 1 or 2 channels."""
        entries = {
            name: [
                self._wandb.Audio(clip, sample_rate=sample_rate)
                for clip in audio_batch(name, clips)
            ]
            for name, clips in audios.items()
        }
        self._run.log(entries, step=step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text per name."""
        pages = {
            name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")
            for name, text in texts.items()
        }
        self._run.log(pages, step=step)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes the distribution of each array's values, in 64 buckets unless told."""
        buckets = num_buckets or {}
        entries = {
            name: self._wandb.Histogram(np.asarray(array), num_bins=buckets.get(name, 64))
            for name, array in arrays.items()
        }
        self._run.log(entries, step=step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Stores a flat mapping as the run's config."""
        self._run.config.update(dict(hparams), allow_val_change=True)

    def flush(self) -> None:
        """Nothing to do: W&B sends in the background."""

    def close(self) -> None:
        """Sends what is left and ends the W&B run."""
        self._run.finish()


def _run_id(path: str, wandb: Any) -> str:
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    run_id = wandb.util.generate_id()
    with open(path, "w", encoding="utf-8") as file:
        file.write(run_id)
    return run_id
