"""Tones, chirps and chords with captions, generated: sound that needs no data and no program."""

import numpy as np

from megatransformer_jax.data.augmentation.random_draws import Purpose, generator_of
from megatransformer_jax.data.media.records import AudioRecord
from megatransformer_jax.data.sources.record import BadRecord

# Pitches in Hz of what captions call low, middle and high; within each, pitch varies a little.
PITCHES_HZ = {"low": 220.0, "middle": 440.0, "high": 880.0}
PITCH_SPREAD = 0.1
DURATION_S = (0.3, 0.9)
# Of the beginning and the end, so that nothing clicks.
FADE_S = 0.02
CHORDS = {"major": (1.0, 5 / 4, 3 / 2), "minor": (1.0, 6 / 5, 3 / 2)}
KINDS = ("tone", "rising chirp", "falling chirp", "major chord", "minor chord", "pulsing tone")


class Tones:
    """Clip n is a function of (seed, n). Its kind and pitch are in the caption: 'a low tone'."""

    def __init__(self, count: int, sample_rate_hz: int, seed: int):
        self._count = count
        self._rate = sample_rate_hz
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> AudioRecord | BadRecord:
        rng = generator_of(self._seed, index, Purpose.TONES)
        kind = KINDS[int(rng.integers(len(KINDS)))]
        pitch = list(PITCHES_HZ)[int(rng.integers(len(PITCHES_HZ)))]
        hz = PITCHES_HZ[pitch] * (1 + PITCH_SPREAD * (2 * rng.random() - 1))
        seconds = DURATION_S[0] + (DURATION_S[1] - DURATION_S[0]) * rng.random()
        return AudioRecord(
            waveform=_sound(kind, hz, seconds, self._rate) * np.float32(0.3 + 0.5 * rng.random()),
            sample_rate_hz=self._rate,
            transcript=f"a {pitch} {kind}",
            is_voice=False,
            where=f"tones, clip {index}",
        )


def _sound(kind: str, hz: float, seconds: float, rate_hz: int) -> np.ndarray:
    """Float32 [samples] in [-1, 1]."""
    time = np.arange(int(seconds * rate_hz)) / rate_hz
    share = time / seconds
    match kind:
        case "rising chirp":
            # From hz to twice that: the phase is the integral of the frequency.
            sound = np.sin(2 * np.pi * hz * time * (1 + share / 2))
        case "falling chirp":
            sound = np.sin(2 * np.pi * 2 * hz * time * (1 - share / 4))
        case "major chord" | "minor chord":
            ratios = CHORDS[kind.split(maxsplit=1)[0]]
            sound = np.mean([np.sin(2 * np.pi * hz * ratio * time) for ratio in ratios], axis=0)
        case "pulsing tone":
            sound = np.sin(2 * np.pi * hz * time) * (0.5 - 0.5 * np.cos(2 * np.pi * 8 * time))
        case _:
            sound = np.sin(2 * np.pi * hz * time)
    fade = np.minimum(1, np.minimum(time, time[::-1]) / FADE_S)
    return (sound * fade).astype(np.float32)
