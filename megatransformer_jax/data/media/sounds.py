"""Clips with texts: generated tones, and folders of files; fitted to the model."""

import os
import pathlib
import struct
import typing

import numpy as np

from megatransformer_jax.data.media.folders import AUDIO_FOLDER, CountedNote, item_text, list_folder
from megatransformer_jax.data.media.records import AudioRecord
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.extras import import_extra
from megatransformer_jax.streams import Purpose, generator_of

# ------------------------------------------------------------------------------
# Tones, chirps and chords with captions, generated: sound that needs no data and no program.

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


# ------------------------------------------------------------------------------
# Clips of any rate and number of channels become the model's, or an error says why not.


class WaveformFitter:
    """Does what `on_wrong_audio` of a section, such as `data.media.audio`, says.

    Attributes:
      note: counts the clips that were changed.
    """

    def __init__(self, sample_rate_hz: int, on_wrong_audio: str, section: str = "data.media.audio"):
        self._option = f"{section}.on_wrong_audio"
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
                f"set {self._option}='convert'.",
            )
        self.note.add(f"{where}, {_counted(channels)}, {sample_rate_hz} Hz")
        mono = samples if samples.ndim == 1 else samples.mean(axis=1)
        return resample(mono, sample_rate_hz, self._rate)


def resample(samples: np.ndarray, old_rate_hz: int, new_rate_hz: int) -> np.ndarray:
    """Mono sound at another rate, float32 [samples] in [-1, 1]; overshoots are cut."""
    soxr = import_extra("soxr", "media", "sound at another rate")
    changed = soxr.resample(samples.astype(np.float32), old_rate_hz, new_rate_hz)
    return np.clip(changed, -1, 1).astype(np.float32)


def _counted(channels: int) -> str:
    return f"{channels} channel" if channels == 1 else f"{channels} channels"


# ------------------------------------------------------------------------------
# The user's own clips in a folder.


class AudioFolder:
    """The WAV and FLAC files that transcripts.jsonl lists, or those with a .txt next to them.

    Raises:
      UserError: see `list_folder`.
    """

    def __init__(self, folder: str, fitter: WaveformFitter, sample_rate_hz: int, is_voice: bool):
        _soundfile()  # A missing package must not look like bad files.
        self._items = list_folder(folder, AUDIO_FOLDER)
        self._fitter = fitter
        self._rate = sample_rate_hz
        self._is_voice = is_voice

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> AudioRecord | BadRecord:
        item = self._items[index]
        where = item.path if item.text is None else f"{item.path} ({item.where})"
        try:
            text = item_text(item)
        except ValueError as error:
            return BadRecord(where, str(error))
        waveform = read_clip(item.path, self._fitter, where)
        if isinstance(waveform, BadRecord):
            return waveform
        return AudioRecord(waveform, self._rate, text, self._is_voice, where)


# ------------------------------------------------------------------------------
# Reads files of sound, and finds those that are cut off.

# Tags of WAV formats whose blocks are one sample of every channel; others pack many into a block.
ONE_SAMPLE_BLOCKS = (0x0001, 0x0003, 0x0006, 0x0007, 0xFFFE)
# A chunk's size in RF64, where another chunk has it; elsewhere it means that it is not known.
NO_SIZE = 0xFFFFFFFF
# libsndfile's count for a FLAC file that does not say how many samples it has.
NO_COUNT = 2**63 - 1
BLOCK_SAMPLES = 1024
_CUT_OFF = "Copy it again from where it is whole, or delete the record."


def read_clip(path: str, fitter: WaveformFitter, where: str) -> np.ndarray | BadRecord:
    """The samples of a file, float32 [samples] in [-1, 1], mono and at the model's rate."""
    try:
        samples, rate_hz = read_sound(path)
    except ValueError as error:
        return BadRecord(where, str(error))
    return fitter.fit(samples, rate_hz, where)


def read_sound(path: str) -> tuple[np.ndarray, int]:
    """All samples, float32 [samples] or [samples, channels], and their number per second.

    Raises:
      ValueError: if the file cannot be read, or ends before the samples that its header promises;
        the message says how to fix it.
    """
    promised = None
    soundfile = _soundfile()
    try:
        with soundfile.SoundFile(path) as file:
            promised, rate_hz = file.frames, file.samplerate
            if promised == NO_COUNT:
                raise ValueError(
                    "its header does not say how many samples it has, so that a missing end would "
                    "not be seen. Write the file again, for example with `flac` from a WAV file."
                )
            if file.format in ("WAV", "WAVEX", "RF64"):
                _check_wav(path)
            samples = file.read(dtype="float32")
    except (OSError, soundfile.SoundFileError) as error:
        found = _num_readable(path) if promised else 0
        if promised is None or found == promised:
            raise ValueError(
                f"cannot be read as sound ({error}). Fix the file, or delete the record."
            ) from error
        raise ValueError(
            f"its header promises {promised} samples, but only about {found} can be read "
            f"({error}). {_CUT_OFF}"
        ) from error
    if len(samples) < promised:
        raise ValueError(
            f"its header promises {promised} samples, but the file has {len(samples)}. {_CUT_OFF}"
        )
    return samples, rate_hz


def _num_readable(path: str) -> int:
    """Samples before the place where decoding fails, in whole blocks."""
    count = 0
    soundfile = _soundfile()
    try:
        with soundfile.SoundFile(path) as file:
            while block := len(file.read(BLOCK_SAMPLES)):
                count += block
    except (OSError, soundfile.SoundFileError):
        pass  # The end that is asked for.
    return count


def _check_wav(path: str) -> None:
    """libsndfile reads what is there of a WAV file, and says nothing of what is not.

    Raises:
      ValueError: if the file ends before the samples that its header promises.
    """
    with pathlib.Path(path).open("rb") as file:
        promised, start, block, tag = _wav_header(file)
    found = os.path.getsize(path) - start
    if promised > found:
        unit = "samples" if tag in ONE_SAMPLE_BLOCKS else "blocks"
        raise ValueError(
            f"its header promises {promised // block} {unit}, but the file has {found // block}. "
            f"{_CUT_OFF}"
        )


def _wav_header(file: typing.BinaryIO) -> tuple[int, int, int, int]:
    """Bytes of sound that are promised (0: it is not said), where they start, bytes of a block of
    samples, and the tag of the format."""
    riff = file.read(12)[:4]
    order = ">" if riff == b"RIFX" else "<"
    long_size, block, tag = 0, 1, 0
    while len(head := file.read(8)) == 8:
        name, size = head[:4], struct.unpack(f"{order}I", head[4:])[0]
        if name == b"data":
            promised = size if size != NO_SIZE else long_size
            return promised, file.tell(), max(block, 1), tag
        content = file.read(size + size % 2)
        if name == b"ds64" and len(content) >= 16:
            long_size = struct.unpack("<Q", content[8:16])[0]
        if name == b"fmt " and len(content) >= 14:
            tag = struct.unpack(f"{order}H", content[:2])[0]
            block = struct.unpack(f"{order}H", content[12:14])[0]
    return 0, file.tell(), block, tag


def _soundfile() -> typing.Any:
    return import_extra("soundfile", "media", "files of sound")
