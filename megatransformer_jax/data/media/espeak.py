"""Speech by espeak-ng, a program that Debian and others package."""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import tempfile

import librosa
import numpy as np
import soundfile
from absl import logging

from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.media.waveform_fitting import resample

PROGRAM = "espeak-ng"
# Silence is what is this far below the loudest place.
SILENCE_DB = 45
# Left before and after speech, in seconds.
MARGIN_S = 0.02


def is_installed() -> bool:
    """Whether espeak-ng is on the path."""
    return shutil.which(PROGRAM) is not None


@functools.lru_cache(maxsize=1)
def version() -> str:
    """What `espeak-ng --version` says, which decides how speech sounds.

    Raises:
      UserError: if it is not installed.
    """
    require()
    shown = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
    return shown.stdout.partition("  Data")[0].strip()


def require() -> None:
    """Raises:
    UserError: if espeak-ng is not installed.
    """
    if not is_installed():
        raise UserError(
            f"{PROGRAM} is not on the PATH, and data.media.audio.source needs it to speak. Install "
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
        words = [version(), str(self.sample_rate_hz), repr(voice), text]
        name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]
        path = pathlib.Path(os.path.expanduser(self.cache_dir)) / f"{name}.npy"
        if path.exists():
            kept: np.ndarray = np.load(path)
            return kept
        made = self._make(text, voice)
        _keep(path, made)
        return made

    def _make(self, text: str, voice: Voice) -> np.ndarray:
        require()
        command = [PROGRAM, "-v", voice.name, "-s", str(voice.rate_wpm), "-p", str(voice.pitch)]
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
                f"{PROGRAM} cannot speak {text!r} with the voice {voice.name!r}: "
                f"{message or 'no sound'}. `{PROGRAM} --voices=en` lists voices.",
            )
        samples, rate_hz = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
        if rate_hz != self.sample_rate_hz:
            logging.log_first_n(
                logging.INFO,
                "%s speaks at %d Hz; resampled to %d Hz",
                1,
                PROGRAM,
                rate_hz,
                self.sample_rate_hz,
            )
            samples = resample(samples, rate_hz, self.sample_rate_hz)
        return _without_silence(samples, self.sample_rate_hz)


def _without_silence(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """Cut to where it is loud, and a margin."""
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
