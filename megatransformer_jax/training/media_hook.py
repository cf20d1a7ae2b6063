"""Images and sound that a run shows of its model: to the writers, and as files."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from matplotlib.image import imsave

from megatransformer_jax.extras import import_extra
from megatransformer_jax.training.writers import MetricWriter, audio_batch, image_batch

PREFIX = "samples"


@dataclasses.dataclass(frozen=True)
class MediaSamples:
    """Named images, clips and texts. Names are parts of file names.

    Attributes:
      images: [H, W, C] each, uint8 or floats in [0, 1]: media, and figures.
      clips: waveforms, float32 [samples] in [-1, 1].
      texts: what an image or a clip of the same name was made from, and texts of other names.
      sample_rate_hz: of the clips; may be None if there are none.
    """

    images: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    clips: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sample_rate_hz: int | None = None

    def __post_init__(self) -> None:
        if self.clips and self.sample_rate_hz is None:
            raise ValueError("there are clips, and sample_rate_hz is None; give their rate")


def write_media_files(samples: MediaSamples, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes `<name>.png`, `<name>.wav` (16 bits) and `texts.jsonl` into a folder, which is made.

    Returns:
      The files.

    Raises:
      ValueError: if an image or a clip is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, image in samples.images.items():
        pixels = image_batch(name, image)[0]
        if pixels.dtype != np.uint8:
            pixels = np.round(pixels * 255).astype(np.uint8)
        files.append(folder / f"{name}.png")
        imsave(files[-1], np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    for name, clip in samples.clips.items():
        assert samples.sample_rate_hz is not None  # Checked where they are made.
        waveform = audio_batch(name, np.asarray(clip)[None, :, None])[0]
        files.append(folder / f"{name}.wav")
        soundfile = import_extra("soundfile", "media", "samples with sound")
        soundfile.write(files[-1], waveform, samples.sample_rate_hz, subtype="PCM_16")
    if samples.texts:
        files.append(folder / "texts.jsonl")
        lines = [json.dumps({"name": n, "text": t}) for n, t in samples.texts.items()]
        files[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


class MediaSampleHook:
    """Shows what the model draws and says (a `Hook` of the training loop).

    All processes make the samples; the primary one writes them, named `samples/...`, and as files
    of `<folder>/step_<n>/`.

    Args:
      every_steps: steps between samples; 0: never.
      make_samples: from (state, step) to samples, called by all processes. Other processes than
        the primary one may return anything.
      writer: takes images, sound and texts.
      folder: where files go. None: this process writes nothing.
    """

    at_stop = False
    skips_bad_steps = True

    def __init__(
        self,
        every_steps: int,
        make_samples: Callable[[Any, int], MediaSamples | None],
        writer: MetricWriter,
        folder: pathlib.Path | None,
    ):
        self.every_steps = every_steps
        self.at_end = every_steps > 0
        self._make_samples = make_samples
        self._writer = writer
        self._folder = folder

    def __call__(self, step: int, state: Any, scalars: Mapping[str, float]) -> dict[str, float]:
        """Makes, writes and logs the samples; returns nothing."""
        samples = self._make_samples(state, step)
        if self._folder is None or samples is None:
            return {}
        folder = self._folder / f"step_{step:06d}"
        files = write_media_files(samples, folder)
        self._writer.write_images(step, _prefixed(samples.images))
        if samples.clips:
            assert samples.sample_rate_hz is not None
            batches = {name: clip[None, :, None] for name, clip in samples.clips.items()}
            self._writer.write_audios(step, _prefixed(batches), sample_rate=samples.sample_rate_hz)
        self._writer.write_texts(step, _prefixed(samples.texts))
        names = ", ".join(file.name for file in files)
        logging.info("samples after step %d in %s: %s", step, folder, names)
        return {}


def _prefixed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}/{name}": value for name, value in values.items()}
