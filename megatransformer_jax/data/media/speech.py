"""Words and sentences spoken by espeak-ng."""

import re
from pydoc_data.topics import topics

import numpy as np

from megatransformer_jax.config.media_data import AudioDataConfig
from megatransformer_jax.data.media import espeak
from megatransformer_jax.data.media.digits import WORDS
from megatransformer_jax.data.media.espeak import Speaker, Voice
from megatransformer_jax.data.media.records import AudioRecord
from megatransformer_jax.data.sources.record import BadRecord

# Multiplying by a large prime mixes voices over sentences, the same everywhere.
MIXER = 2_654_435_761


class Spoken:
    """Texts in voices; each is spoken when it is first asked for, then kept in memory.

    Raises:
      UserError: if espeak-ng is not installed.
    """

    def __init__(self, name: str, items: list[tuple[str, Voice]], speaker: Speaker):
        espeak.require()
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


def spoken_digits(options: AudioDataConfig, sample_rate_hz: int) -> Spoken:
    """Every word from zero to nine in every voice, speed and pitch."""
    items = [(word, voice) for voice in _voices(options) for word in WORDS]
    return Spoken("spoken digits", items, Speaker(sample_rate_hz, options.cache_dir))


def speech(options: AudioDataConfig, sample_rate_hz: int) -> Spoken:
    """Every sentence of the embedded text once, each in one of the voices, speeds and pitches."""
    voices = _voices(options)
    items = [
        (sentence, voices[number * MIXER % 2**32 % len(voices)])
        for number, sentence in enumerate(sentences(options.max_words))
    ]
    return Spoken("speech", items, Speaker(sample_rate_hz, options.cache_dir))


def _voices(options: AudioDataConfig) -> list[Voice]:
    return [
        Voice(name, rate, pitch)
        for name in options.voices
        for rate in options.rates_wpm
        for pitch in options.pitches
    ]


def sentences(max_words: int) -> list[str]:
    """Different sentences of `pydoc_data.topics` that have words and blanks alone, in their order.

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
