"""Words and sentences spoken by espeak-ng, a program that Debian and others package."""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from pydoc_data.topics import topics

import numpy as np
from absl import logging

from megatransformer_jax.config.media_data import AudioSourceConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.media.images import WORDS
from megatransformer_jax.data.media.records import AudioRecord
from megatransformer_jax.data.media.sounds import resample
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.extras import import_extra

# ------------------------------------------------------------------------------
# The program.

ESPEAK = "espeak-ng"
# Silence is what is this far below the loudest place.
SILENCE_DB = 45
# Left before and after speech, in seconds.
MARGIN_S = 0.02


def espeak_is_installed() -> bool:
    """Whether espeak-ng is on the path."""
    return shutil.which(ESPEAK) is not None


@functools.lru_cache(maxsize=1)
def espeak_version() -> str:
    """What `espeak-ng --version` says, which decides how speech sounds.

    Raises:
      UserError: if it is not installed.
    """
    require_espeak()
    shown = subprocess.run([ESPEAK, "--version"], capture_output=True, text=True, check=True)
    return shown.stdout.partition("  Data")[0].strip()


def require_espeak() -> None:
    """Raises:
    UserError: if espeak-ng is not installed.
    """
    if not espeak_is_installed():
        raise UserError(
            f"{ESPEAK} is not on the PATH, and data.media.audio.source needs it to speak. Install "
            "it (Debian, Ubuntu: apt-get install espeak-ng; macOS: brew install espeak-ng), or set "
            "data.media.audio.source='tones'."
        )


@dataclasses.dataclass(frozen=True)
class Voice:
    """How something is spoken."""

    name: str
    rate_wpm: int
    pitch: int


@dataclasses.dataclass(frozen=True)
class Speaker:
    """Speaks texts; the same text and voice give the same samples with one version of espeak-ng.

    Attributes:
      sample_rate_hz: what its sound, of 22050 Hz, is resampled to.
      cache_dir: keeps what has been spoken. None: nothing is kept.
    """

    sample_rate_hz: int
    cache_dir: str | None = None

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """Mono float32 [samples] in [-1, 1], without the silence around it.

        Raises:
          UserError: if espeak-ng is missing or fails, or has no such voice.
        """
        if self.cache_dir is None:
            return self._make(text, voice)
        words = [espeak_version(), str(self.sample_rate_hz), repr(voice), text]
        name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]
        path = pathlib.Path(os.path.expanduser(self.cache_dir)) / f"{name}.npy"
        if path.exists():
            kept: np.ndarray = np.load(path)
            return kept
        made = self._make(text, voice)
        _keep(path, made)
        return made

    def _make(self, text: str, voice: Voice) -> np.ndarray:
        require_espeak()
        command = [ESPEAK, "-v", voice.name, "-s", str(voice.rate_wpm), "-p", str(voice.pitch)]
        done = subprocess.run(
            [*command, "--stdin", "--stdout"],
            input=text.encode(),
            capture_output=True,
            check=False,
        )
        message = done.stderr.decode(errors="replace").strip()
        if done.returncode or not done.stdout or "does not exist" in message:
            raise ConfigError(
                "data.media.audio.voices",
                f"{ESPEAK} cannot speak {text!r} with the voice {voice.name!r}: "
                f"{message or 'no sound'}. `{ESPEAK} --voices=en` lists voices.",
            )
        soundfile = import_extra("soundfile", "media", "speech of espeak-ng")
        samples, rate_hz = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
        if rate_hz != self.sample_rate_hz:
            logging.log_first_n(
                logging.INFO,
                "%s speaks at %d Hz; resampled to %d Hz",
                1,
                ESPEAK,
                rate_hz,
                self.sample_rate_hz,
            )
            samples = resample(samples, rate_hz, self.sample_rate_hz)
        return _without_silence(samples, self.sample_rate_hz)


def _without_silence(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """Cut to where it is loud, and a margin."""
    librosa = import_extra("librosa", "media", "speech of espeak-ng")
    _, (start, end) = librosa.effects.trim(
        samples, top_db=SILENCE_DB, frame_length=512, hop_length=128
    )
    margin = int(MARGIN_S * rate_hz)
    return np.ascontiguousarray(samples[max(start - margin, 0) : end + margin])


def _keep(path: pathlib.Path, samples: np.ndarray) -> None:
    """Writes a file so that another process sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(descriptor, "wb") as file:
        np.save(file, samples)
    os.replace(temporary, path)


# ------------------------------------------------------------------------------
# What is spoken.

# Multiplying by a large prime mixes voices over sentences, the same everywhere.
MIXER = 2_654_435_761


class Spoken:
    """Texts in voices; each is spoken when it is first asked for, then kept in memory.

    Raises:
      UserError: if espeak-ng is not installed.
    """

    def __init__(self, name: str, items: list[tuple[str, Voice]], speaker: Speaker):
        require_espeak()
        self._name = name
        self._items = items
        self._speaker = speaker
        self._spoken: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> AudioRecord | BadRecord:
        text, voice = self._items[index]
        if index not in self._spoken:
            self._spoken[index] = self._speaker.speak(text, voice)
        return AudioRecord(
            waveform=self._spoken[index],
            sample_rate_hz=self._speaker.sample_rate_hz,
            transcript=text,
            is_voice=True,
            where=f"{self._name}, clip {index} ({text!r}, {voice.name})",
        )


def spoken_digits(options: AudioSourceConfig, sample_rate_hz: int) -> Spoken:
    """Every word from zero to nine in every voice, speed and pitch."""
    items = [(word, voice) for voice in _voices(options) for word in WORDS]
    return Spoken("spoken digits", items, Speaker(sample_rate_hz, options.cache_dir))


def speech(options: AudioSourceConfig, sample_rate_hz: int) -> Spoken:
    """Every sentence of the embedded text once, each in one of the voices, speeds and pitches."""
    voices = _voices(options)
    items = [
        (sentence, voices[number * MIXER % 2**32 % len(voices)])
        for number, sentence in enumerate(sentences(options.max_words))
    ]
    return Spoken("speech", items, Speaker(sample_rate_hz, options.cache_dir))


def _voices(options: AudioSourceConfig) -> list[Voice]:
    return [
        Voice(name, rate, pitch)
        for name in options.voices
        for rate in options.rates_wpm
        for pitch in options.pitches
    ]


def sentences(max_words: int) -> list[str]:
    """Different sentences of `pydoc_data.topics` that have words and spaces alone, in their order.

    Longer ones are cut up into parts of `max_words`, of which a last one of a single word is left
    out. They are in lower case, without the mark at their end.
    """
    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            for sentence in re.split(r"(?<=[.:;?!])\s+", " ".join(paragraph.split())):
                words = re.sub(r"[.:;?!,]+(?=\s|$)", "", sentence).lower().split()
                if len(words) < 2 or not all(re.fullmatch(r"[a-z]+", word) for word in words):
                    continue
                for start in range(0, len(words), max_words):
                    part = words[start : start + max_words]
                    if len(part) > 1 or max_words == 1:
                        found[" ".join(part)] = None
    return list(found)
