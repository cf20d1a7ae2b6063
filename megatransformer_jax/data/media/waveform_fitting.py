"""Clips of any rate and number of channels become the model's, or an error says why not."""

import numpy as np
import soxr

from megatransformer_jax.data.media.counted_note import CountedNote
from megatransformer_jax.data.sources.record import BadRecord


class WaveformFitter:
    """Does what `data.media.audio.on_wrong_audio` says.

    Attributes:
      note: counts the clips that were changed.
    """

    def __init__(self, sample_rate_hz: int, on_wrong_audio: str):
        self._rate = sample_rate_hz
        self._converts = on_wrong_audio == "convert"
        self.note = CountedNote(f"clips mixed to mono or resampled to {sample_rate_hz} Hz")

    def fit(self, samples: np.ndarray, sample_rate_hz: int, where: str) -> np.ndarray | BadRecord:
        """Mono float32 [samples] in [-1, 1] at the model's rate.

        Args:
          samples: float [samples] or [samples, channels], or integers of 16 or 32 bits.
          sample_rate_hz: of these.
          where: for messages.
        """
        if samples.dtype.kind == "i":
            samples = samples / -float(np.iinfo(samples.dtype).min)
        if not samples.size:
            return BadRecord(where, "the clip has no samples. Delete the record.")
        if not np.isfinite(samples).all():
            return BadRecord(where, "the clip has samples that are not finite. Delete the record.")
        if samples.ndim == 2 and samples.shape[1] == 1:
            samples = samples[:, 0]
        if samples.ndim == 1 and sample_rate_hz == self._rate:
            if np.abs(samples).max() > 1:
                return BadRecord(
                    where,
                    f"samples must be in [-1, 1], these reach {np.abs(samples).max():g}. Scale "
                    "the clip.",
                )
            return samples.astype(np.float32)
        channels = 1 if samples.ndim == 1 else samples.shape[1]
        if not self._converts:
            return BadRecord(
                where,
                f"the clip has {_counted(channels)} and {sample_rate_hz} samples per second; the "
                f"model needs mono and model.audio.mel.sample_rate_hz={self._rate}. Convert it, or "
                "set data.media.audio.on_wrong_audio='convert'.",
            )
        self.note.add(f"{where}, {_counted(channels)}, {sample_rate_hz} Hz")
        mono = samples if samples.ndim == 1 else samples.mean(axis=1)
        return resample(mono, sample_rate_hz, self._rate)


def resample(samples: np.ndarray, old_rate_hz: int, new_rate_hz: int) -> np.ndarray:
    """Mono sound at another rate, float32 [samples] in [-1, 1]; overshoots are cut."""
    changed = soxr.resample(samples.astype(np.float32), old_rate_hz, new_rate_hz)
    return np.clip(changed, -1, 1).astype(np.float32)


def _counted(channels: int) -> str:
    return f"{channels} channel" if channels == 1 else f"{channels} channels"
