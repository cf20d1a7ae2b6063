"""Writers of metrics and media: TensorBoard, Weights & Biases, and several at once."""

import html
import os
import pathlib
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatransformer_jax.config.loop import LoggingConfig
from megatransformer_jax.extras import import_extra

# ------------------------------------------------------------------------------
# The protocol, the configured writers, and fanning out to them.


@typing.runtime_checkable
class MetricWriter(typing.Protocol):
    """What training writes metrics and media to. The names are those of clu's `MetricWriter`."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one number per name."""

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images [H, W, C] or [N, H, W, C], uint8 or floats in [0, 1]."""

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Writes sound [N, T, C] in [-1, 1], 1 or 2 channels."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes one text per name."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes the distribution of each array's values."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes a flat mapping of hyperparameters."""

    def flush(self) -> None:
        """Hands on everything that was written so far."""

    def close(self) -> None:
        """Flushes and closes."""


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


class MultiWriter:
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


# ------------------------------------------------------------------------------
# Writes metrics as TensorBoard events, without TensorFlow.


class TensorBoardWriter:
    """A `MetricWriter` over tensorboardX: numbers, images, sound, texts, histograms, options.

    Args:
      directory: where the event file goes.
      start_step: first step that will be written. Events of an earlier, interrupted run from
        this step on are hidden by TensorBoard.
    """

    def __init__(self, directory: str | os.PathLike[str], start_step: int = 0):
        # It imports torch where that is installed, which takes a second.
        import tensorboardX  # noqa: PLC0415

        purge_step = start_step if start_step > 0 else None
        earlier = _event_files(directory)
        self._writer = tensorboardX.SummaryWriter(
            os.fspath(directory),
            purge_step=purge_step,
            # The rest of the name is the second, which two quick starts may share.
            filename_suffix=f".{start_step:08d}",
        )
        _put_last(_event_files(directory) - earlier, earlier)

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
        from tensorboardX.summary import hparams as make_events  # noqa: PLC0415

        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in hparams.items()
        }
        for event in make_events(plain, {}):
            self._writer.file_writer.add_summary(event)

    def flush(self) -> None:
        """Hands everything written so far to the file system."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


# TensorBoard reads the files of a folder in the order of their names, which have the second.
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)(\..*)")


def _event_files(directory: str | os.PathLike[str]) -> set[pathlib.Path]:
    folder = pathlib.Path(directory)
    paths = folder.iterdir() if folder.is_dir() else ()
    return {path for path in paths if _EVENT_FILE.fullmatch(path.name)}


def _put_last(new: set[pathlib.Path], earlier: set[pathlib.Path]) -> None:
    """Renames a file that would come before those of earlier starts: a clock may be set back.

    It may be open: what is written goes on into it.
    """
    newest = max((int(_EVENT_FILE.sub(r"\1", path.name)) for path in earlier), default=-1)
    for path in new:
        if int(_EVENT_FILE.sub(r"\1", path.name)) <= newest:
            name = _EVENT_FILE.sub(rf"events.out.tfevents.{newest + 1:010d}\2", path.name)
            path.rename(path.with_name(name))


def _tags(name: str, is_single: bool, count: int) -> list[str]:
    """A tag is one picture or clip."""
    return [name] if is_single else [f"{name}/{index}" for index in range(count)]


# ------------------------------------------------------------------------------
# Writes metrics to Weights & Biases (extra `wandb`).


class WandbWriter:
    """A `MetricWriter` over one W&B run; a resumed workdir continues its W&B run.

    Args:
      project: W&B project.
      directory: the run's workdir; the W&B run id is kept in it.

    Raises:
      ConfigError: if the package wandb is not installed.
    """

    def __init__(self, project: str, directory: str | os.PathLike[str]):
        wandb = import_extra("wandb", "wandb", "'wandb' in logging.writers")
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


# ------------------------------------------------------------------------------
# What may be written as an image or as sound; the checks are the same for all back ends.


def image_batch(name: str, images: Any) -> np.ndarray:
    """Images as [N, H, W, C], of uint8 or of floats in [0, 1].

    Args:
      name: what they are written as, for messages.
      images: [H, W, C] or [N, H, W, C].

    Raises:
      ValueError: if the shape, the type or the values are not those of images.
    """
    array = np.asarray(images)
    batch = array[None] if array.ndim == 3 else array
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3):
        raise ValueError(
            f"{name}: images of shape {array.shape}; they must be [H, W, C] or [N, H, W, C] with 1 "
            "channel, grey, or 3, RGB"
        )
    if batch.dtype != np.uint8:
        _check_floats(name, batch, "images", 0.0, 1.0, "map images in [-1, 1] by (x + 1) / 2")
    return batch


def audio_batch(name: str, clips: Any) -> np.ndarray:
    """Sound as [N, T, C], floats in [-1, 1].

    Args:
      name: what it is written as, for messages.
      clips: [N, T, C] with 1 channel or 2.

    Raises:
      ValueError: if the shape, the type or the values are not those of sound.
    """
    batch = np.asarray(clips)
    if batch.ndim != 3 or batch.shape[-1] not in (1, 2) or not batch.shape[1]:
        raise ValueError(
            f"{name}: sound of shape {batch.shape}; it must be [N, T, C] with at least one sample "
            "and 1 or 2 channels"
        )
    _check_floats(name, batch, "sound", -1.0, 1.0, "divide it by its largest absolute value")
    return batch


def _check_floats(
    name: str, array: np.ndarray, what: str, low: float, high: float, fix: str
) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name}: {what} of type {array.dtype}; make it floating-point")
    # Comparisons with NaN are False, so that it fails as well.
    if array.size and not (array.min() >= low and array.max() <= high):
        raise ValueError(
            f"{name}: {what} with values from {array.min():.4g} to {array.max():.4g}; they must be "
            f"in [{low:g}, {high:g}]; {fix}"
        )
