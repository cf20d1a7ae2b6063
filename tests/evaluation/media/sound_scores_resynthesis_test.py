"""Means over the clips that each metric can compare."""

import sys

import numpy as np
import pytest
from rich.console import Console

from megatransformer_jax.evaluation.media.sound_scores import (
    MeanScore,
    pesq,
    resynthesis_scores,
    si_sdr,
    stoi,
)
from megatransformer_jax.evaluation.media.table import make_resynthesis_table


def clips(rate_hz):
    rng = np.random.default_rng(0)
    times = np.arange(rate_hz) / rate_hz
    wave = np.sin(2 * np.pi * 300 * times) * np.clip(np.sin(2 * np.pi * 3 * times), 0, None)
    short = wave[: rate_hz // 5]
    noisy = [clean + 0.01 * rng.normal(size=clean.shape) for clean in (wave, short)]
    return [wave, short, wave], [*noisy, np.zeros_like(wave)]


def test_what_cannot_be_compared_is_left_out():
    references, estimates = clips(16_000)
    scores = resynthesis_scores(references, estimates, 16_000, "nothing")
    assert scores.clips == 3
    first = references[0], estimates[0]
    assert scores.pesq == MeanScore(pesq(*first, 16_000, "wb"), 1)
    assert scores.stoi == MeanScore(stoi(*first, 16_000), 1)
    of_two = [si_sdr(references[n], estimates[n]) for n in range(2)]
    assert scores.si_sdr_db == MeanScore(float(np.mean(of_two)), 2)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(make_resynthesis_table(scores))
    text = " ".join(console.export_text().replace("│", " ").split())
    assert f"STOI {scores.stoi.mean:.3f} 1 of 3" in text and "PESQ" in text


def test_rates_without_pesq():
    references, estimates = clips(10_000)
    scores = resynthesis_scores(references[1:], estimates[1:], 10_000, "nothing")
    assert scores.pesq is None
    assert scores.stoi == MeanScore(None, 0)
    assert scores.si_sdr_db.clips == 1


def test_a_missing_library_is_no_clip_that_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)
    references, estimates = clips(16_000)
    with pytest.raises(ValueError, match="PESQ: pesq cannot be imported"):
        resynthesis_scores(references, estimates, 16_000, "nothing")
