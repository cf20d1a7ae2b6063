"""PESQ, STOI and SI-SDR against formulas of their own, and what they refuse."""

import math
import sys

import numpy as np
import pesq as pesq_library
import pytest
import stoi_reference

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.media.sound_scores import pesq, si_sdr, stoi

RNG = np.random.default_rng(0)


def words(rate_hz, duration_s=1.5):
    """Harmonics that come and go as syllables do."""
    times = np.arange(int(rate_hz * duration_s)) / rate_hz
    tones = sum(np.sin(2 * np.pi * 140 * k * times + k) / k for k in range(1, 20))
    return 0.2 * tones * np.clip(np.sin(2 * np.pi * 3 * times), 0, None)


def noisy(wave, level):
    return wave + level * RNG.normal(size=wave.shape)


def test_si_sdr_is_the_correlation_in_decibels():
    clean = RNG.normal(size=400)
    for level in (0.1, 1.0, 10.0):
        heard = noisy(clean, level)
        rho = np.corrcoef(clean, heard)[0, 1]
        wanted = 10 * math.log10(rho**2 / (1 - rho**2))
        assert si_sdr(clean, heard) == pytest.approx(wanted)
        assert si_sdr(clean, 3 * heard + 1) == pytest.approx(wanted)
    assert si_sdr(clean, clean) > 200
    orthogonal = np.array([1.0, -1.0, 1.0, -1.0])
    assert si_sdr(orthogonal, np.array([1.0, 1.0, -1.0, -1.0])) == -math.inf


def test_stoi_equals_an_independent_implementation():
    clean = words(10_000)
    for level in (0.02, 0.3):
        heard = noisy(clean, level)
        assert stoi(clean, heard, 10_000) == pytest.approx(
            stoi_reference.stoi(clean, heard), abs=1e-4
        )
    assert stoi(clean, clean, 10_000) == pytest.approx(1)


@pytest.mark.parametrize(
    ("band", "rate_hz", "slope", "offset"),
    # P.862.2 and P.862.1: from the raw score to MOS-LQO.
    [("wb", 16_000, 1.3669, 3.8224), ("nb", 8_000, 1.4945, 4.6607)],
)
def test_pesq_has_its_best_value_and_falls_with_noise(band, rate_hz, slope, offset):
    clean = words(rate_hz)
    best = 0.999 + 4 / (1 + math.exp(-slope * 4.5 + offset))
    scores = [pesq(clean, noisy(clean, level), rate_hz, band) for level in (0.0, 0.0003, 0.003)]
    assert scores[0] == pytest.approx(best, abs=0.01)
    assert scores[0] > scores[1] + 0.1 > scores[2] + 0.2
    assert scores[2] >= 1
    # Loudness plays no part.
    assert pesq(clean, 0.5 * clean, rate_hz, band) == pytest.approx(best, abs=0.05)


def test_what_cannot_be_compared():
    clean = words(16_000)
    silence = np.zeros_like(clean)
    for metric in (si_sdr, lambda *two: stoi(*two, 16_000), lambda *two: pesq(*two, 16_000)):
        with pytest.raises(UserError, match="estimate is silent"):
            metric(clean, silence)
        with pytest.raises(UserError, match="reference is silent"):
            metric(silence, clean)
        with pytest.raises(UserError, match="24000 samples and the estimate 23999"):
            metric(clean, clean[1:])
        with pytest.raises(UserError, match="not finite"):
            metric(clean, np.where(clean > 0.1, np.nan, clean))
    with pytest.raises(UserError, match="defined at 16000 Hz, and the sound has 22050"):
        pesq(clean, clean, 22_050)
    with pytest.raises(UserError, match="defined at 8000 or 16000 Hz"):
        pesq(clean, clean, 44_100, "nb")
    with pytest.raises(UserError, match="band='swb'"):
        pesq(clean, clean, 16_000, "swb")
    with pytest.raises(UserError, match="quarter of a second"):
        pesq(clean[3000:6000], clean[3000:6000], 16_000)
    with pytest.raises(UserError, match=r"0\.4 s without silence"):
        stoi(clean[3000:6000], clean[3000:6000], 16_000)


def test_what_pesq_refuses_is_passed_on(monkeypatch):
    def refuse(*arguments):
        raise pesq_library.NoUtterancesError(b"No utterances detected")

    monkeypatch.setattr(pesq_library, "pesq", refuse)
    clean = words(16_000)
    with pytest.raises(UserError, match=r"No utterances detected\. It needs speech"):
        pesq(clean, clean, 16_000)


def test_a_missing_library_names_the_extra(monkeypatch):
    for name in ("pesq", "pystoi"):
        monkeypatch.setitem(sys.modules, name, None)
    clean = words(16_000)
    with pytest.raises(UserError, match=r"PESQ: pesq cannot be imported .*\[eval\]"):
        pesq(clean, clean, 16_000)
    with pytest.raises(UserError, match="STOI: pystoi cannot be imported"):
        stoi(clean, clean, 16_000)
