"""Sources of sound: tones, folders, espeak-ng's speech; clips that do not fit."""

import json
import pathlib
import pickle

import numpy as np
import pytest
import soundfile

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.media_data import AudioDataConfig, MediaDataConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.fingerprint import data_fingerprint
from megatransformer_jax.data.media import build
from megatransformer_jax.data.media.build import audio_source_name, build_audio_source
from megatransformer_jax.data.media.records import AudioRecord
from megatransformer_jax.data.media.sounds import AudioFolder, Tones, WaveformFitter
from megatransformer_jax.data.media.speech import sentences, spoken_digits
from megatransformer_jax.data.sources.record import BadRecord

needs_espeak = pytest.mark.skipif(
    not build.espeak_is_installed(), reason="espeak-ng is not installed"
)


def config(**audio: object) -> DataConfig:
    options = AudioDataConfig(**audio)  # type: ignore[arg-type]
    media = MediaDataConfig(tasks=("speak=1",), audio=options)
    return DataConfig(source="media", tokenizer=TokenizerConfig(kind="bytes"), media=media)


def record(source: object, index: int) -> AudioRecord:
    found = source[index]  # type: ignore[index]
    assert isinstance(found, AudioRecord)
    return found


def pitch(sound: np.ndarray, rate_hz: int) -> float:
    """The strongest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    return float(spectrum.argmax() * rate_hz / len(sound))


def test_tones_sound_as_their_captions_say() -> None:
    tones = Tones(80, 8000, seed=1)
    found = [record(tones, index) for index in range(len(tones))]
    captions = {each.transcript for each in found}
    assert len(captions) > 12
    for each in found:
        sound = each.waveform
        assert sound.dtype == np.float32 and 0.05 < np.abs(sound).max() <= 0.8
        assert 0.3 * 8000 - 1 <= len(sound) <= 0.9 * 8000 and not each.is_voice
        low, high = {"low": (190, 250), "middle": (390, 490), "high": (790, 970)}[
            each.transcript.split()[1]
        ]
        quarter = len(sound) // 4
        start, end = pitch(sound[:quarter], 8000), pitch(sound[-quarter:], 8000)
        if "rising" in each.transcript:
            assert end > 1.4 * start
        elif "falling" in each.transcript:
            assert start > 1.4 * end
        elif each.transcript.endswith("tone"):
            assert low < pitch(sound, 8000) < high
    np.testing.assert_array_equal(record(Tones(5, 8000, 1), 4).waveform, found[4].waveform)
    assert not np.array_equal(record(Tones(5, 8000, 2), 4).waveform, found[4].waveform)


def test_auto_says_which_source_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "espeak_is_installed", lambda: False)
    assert audio_source_name(config()) == "tones"
    assert len(build_audio_source(config(num_tones=20), MelConfig(), "validation")) == 1
    monkeypatch.setattr(build, "espeak_is_installed", lambda: True)
    assert audio_source_name(config()) == "spoken_digits"
    assert audio_source_name(config(source="speech")) == "speech"


def test_without_espeak_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"espeak-ng is not on the PATH.*apt-get install espeak-"):
        build_audio_source(config(source="spoken_digits"), MelConfig(), "train")


def test_sentences_are_of_words_and_at_most_so_long() -> None:
    found = sentences(6)
    assert len(found) > 1000 and len(set(found)) == len(found)
    assert all(2 <= len(each.split()) <= 6 and each.replace(" ", "").isalpha() for each in found)


@needs_espeak
def test_digits_are_spoken_in_every_voice_the_same_each_time(tmp_path: pathlib.Path) -> None:
    options = AudioDataConfig(
        source="spoken_digits", voices=("en", "en-us+f3"), rates_wpm=(170,), pitches=(40, 60)
    )
    source = spoken_digits(options, 16000)
    assert len(source) == 40
    found = [record(source, index) for index in (3, 13, 23)]
    assert [each.transcript for each in found] == ["three"] * 3
    for each in found:
        assert each.is_voice and each.sample_rate_hz == 16000
        assert 0.15 < len(each.waveform) / 16000 < 1 and 0.05 < np.abs(each.waveform).max() <= 1
        # Nothing is silent at either end for long.
        for end in (each.waveform[:800], each.waveform[-1600:]):
            assert np.abs(end).max() > 0.003
    assert len({len(each.waveform) for each in found}) > 1
    kept = AudioDataConfig(**{**vars(options), "cache_dir": str(tmp_path)})
    for _ in range(2):
        again = record(spoken_digits(kept, 16000), 13)
        np.testing.assert_array_equal(again.waveform, found[1].waveform)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
    with pytest.raises(ConfigError, match=r"voices: espeak-ng cannot speak 'zero' with .*'xx-no'"):
        spoken_digits(AudioDataConfig(voices=("xx-no",)), 16000)[0]


@needs_espeak
def test_sentences_are_spoken_in_voices_in_turn() -> None:
    source = build_audio_source(config(source="speech", max_words=4), MelConfig(), "validation")
    found = record(source, 0)
    assert found.is_voice and len(found.waveform) > 4000
    assert len(found.transcript.split()) <= 4
    assert "speech by eSpeak NG" in data_fingerprint(config(source="speech"))


def test_clips_of_another_rate_or_with_channels_are_errors_or_converted() -> None:
    time = np.arange(8000) / 16000
    left = np.sin(2 * np.pi * 300 * time) / 2
    stereo = np.stack([left, np.zeros(8000)], axis=1)
    problem = WaveformFitter(8000, "error").fit(stereo, 16000, "a.wav")
    assert isinstance(problem, BadRecord)
    assert "a.wav: the clip has 2 channels and 16000 samples per second" in str(problem)
    assert "on_wrong_audio='convert'" in problem.problem
    fitter = WaveformFitter(8000, "convert")
    mono = fitter.fit(stereo, 16000, "a.wav")
    assert isinstance(mono, np.ndarray) and mono.dtype == np.float32 and len(mono) == 4000
    np.testing.assert_allclose(mono[500:3500], (left / 2)[::2][500:3500], atol=1e-3)
    assert fitter.note.count == 1


def test_clips_that_fit_are_kept_and_integers_scaled() -> None:
    fitter = WaveformFitter(8000, "error")
    sound = np.linspace(-1, 1, 9, dtype=np.float32)
    np.testing.assert_array_equal(fitter.fit(sound[:, None], 8000, "a"), sound)
    whole = fitter.fit(np.array([-32768, 0, 16384], np.int16), 8000, "a")
    np.testing.assert_array_equal(whole, [-1, 0, 0.5])
    assert fitter.note.count == 0
    for samples, message in (
        (sound[:0], "no samples"),
        (sound * np.nan, "not finite"),
        (sound * 3, "reach 3"),
    ):
        problem = fitter.fit(samples, 8000, "b.wav")
        assert isinstance(problem, BadRecord) and message in problem.problem


def test_a_folder_of_clips_is_read(tmp_path: pathlib.Path) -> None:
    sound = np.sin(np.arange(800) / 5).astype(np.float32) / 2
    soundfile.write(tmp_path / "a.wav", sound, 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.flac", np.stack([sound, sound], 1), 8000)
    (tmp_path / "c.wav").write_bytes(b"RIFF nothing")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"clip {name}")

    def source() -> AudioFolder:
        fitter = WaveformFitter(8000, "error")
        return pickle.loads(pickle.dumps(AudioFolder(str(tmp_path), fitter, 8000, False)))

    first = record(source(), 0)
    np.testing.assert_array_equal(first.waveform, sound)
    assert (first.transcript, first.is_voice) == ("clip a", False)
    assert "b.flac: the clip has 2 channels" in str(source()[1])
    assert "c.wav: cannot be read as sound" in str(source()[2])
    (tmp_path / "transcripts.jsonl").write_text(
        json.dumps({"audio": "a.wav", "transcript": "listed"})
    )
    assert len(source()) == 1 and record(source(), 0).transcript == "listed"
    options = config(source="audio_folder", folder=str(tmp_path))
    before = data_fingerprint(options)
    soundfile.write(tmp_path / "a.wav", sound / 2, 8000, subtype="FLOAT")
    assert data_fingerprint(options) != before


def test_the_log_names_the_file_that_converts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="absl"):
        WaveformFitter(8000, "convert").fit(np.zeros(100, np.float32), 16000, "a.wav")
    (line,) = caplog.records
    assert line.filename == "sounds.py"
    assert line.getMessage() == (
        "1 clips mixed to mono or resampled to 8000 Hz; the latest: a.wav, 1 channel, 16000 Hz"
    )
