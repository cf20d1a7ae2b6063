"""How close clips come to themselves when they are made again from their spectrograms."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megatransformer_jax.evaluation.media.audio_quality import (
    PESQ_RATES,
    NotComparableError,
    pesq,
    si_sdr,
    stoi,
)


@dataclasses.dataclass(frozen=True)
class MeanScore:
    """Mean over the clips that a metric can compare, and how many these are; None if none."""

    mean: float | None
    clips: int


@dataclasses.dataclass(frozen=True)
class ResynthesisScores:
    """Means over clips; higher is better.

    What a vocoder loses bounds how good any sound from the model's spectrograms can be.

    Attributes:
      method: that made waveforms of spectrograms.
      clips: how many there were.
      pesq: wide band at 16 kHz, narrow band at 8 kHz, about 1 to 4.6; None at other rates.
      stoi: about 0 to 1; of clips with 0.4 s of sound.
      si_sdr_db: counts every shift of phase, which a spectrogram does not tell.
    """

    method: str
    clips: int
    pesq: MeanScore | None
    stoi: MeanScore
    si_sdr_db: MeanScore


def resynthesis_scores(
    references: Sequence[np.ndarray],
    estimates: Sequence[np.ndarray],
    sample_rate_hz: int,
    method: str,
) -> ResynthesisScores:
    """Compares waveforms pair by pair; what a metric cannot compare is left out of its mean.

    Args:
      references: as recorded.
      estimates: made again, each as long as its reference.
      sample_rate_hz: of all.
      method: that made them.

    Raises:
      UserError: if a library is not installed.
      ValueError: if there are not as many estimates as references.
    """
    pairs = list(zip(references, estimates, strict=True))
    bands = [band for band in ("wb", "nb") if sample_rate_hz in PESQ_RATES[band]]
    return ResynthesisScores(
        method=method,
        clips=len(pairs),
        pesq=_mean(pairs, lambda a, b: pesq(a, b, sample_rate_hz, bands[0])) if bands else None,
        stoi=_mean(pairs, lambda a, b: stoi(a, b, sample_rate_hz)),
        si_sdr_db=_mean(pairs, si_sdr),
    )


def _mean(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    metric: Callable[[np.ndarray, np.ndarray], float],
) -> MeanScore:
    values = []
    for reference, estimate in pairs:
        try:
            values.append(metric(reference, estimate))
        except NotComparableError:
            continue
    return MeanScore(float(np.mean(values)) if values else None, len(values))
