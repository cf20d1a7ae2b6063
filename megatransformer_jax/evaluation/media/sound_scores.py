"""How good sound and transcripts are: PESQ, STOI, SI-SDR, resynthesis, word errors.

Scores of quality compare a waveform with the clean one it should be, sample by sample, so they
judge vocoders and resynthesis. Generated sound has no such reference.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from megatransformer_jax.config.option import UserError
from megatransformer_jax.extras import import_extra

# ------------------------------------------------------------------------------
# Sound against its reference.

# Sample rates that PESQ is defined for, by band.
PESQ_RATES = {"nb": (8000, 16000), "wb": (16000,)}
# Quieter than this is silence; full scale is 1.
_SILENCE = 1e-6


class NotComparableError(UserError):
    """Two waveforms that a metric cannot compare, though it could compare others."""


def pesq(
    reference: Float[np.ndarray, "samples"],
    estimate: Float[np.ndarray, "estimated_samples"],
    sample_rate_hz: int,
    band: str = "wb",
) -> float:
    """Perceptual evaluation of speech quality, MOS-LQO: about 1 (bad) to 4.6 (no difference).

    ITU-T P.862.2 for wide band ('wb', 16 kHz) and P.862.1 for narrow band ('nb', 8 or 16 kHz), by
    the library pesq. Meant for speech, not for other sound.

    Args:
      reference: the clean speech.
      estimate: what is judged, as long as the reference.
      sample_rate_hz: of both.
      band: 'wb' or 'nb'.

    Raises:
      NotComparableError: if a waveform is silent, shorter than a quarter of a second or without
        speech, or lengths differ.
      UserError: if the rate does not go with the band, or pesq is not installed.
    """
    if band not in PESQ_RATES:
        raise UserError(f"band={band!r} is not known to PESQ; use one of {', '.join(PESQ_RATES)}.")
    if sample_rate_hz not in PESQ_RATES[band]:
        rates = " or ".join(map(str, PESQ_RATES[band]))
        raise UserError(
            f"PESQ's band {band!r} is defined at {rates} Hz, and the sound has {sample_rate_hz}; "
            "resample both waveforms."
        )
    _check(reference, estimate)
    if len(reference) < sample_rate_hz // 4:
        raise NotComparableError(
            f"PESQ needs at least a quarter of a second ({sample_rate_hz // 4} samples), and the "
            f"sound has {len(reference)}; give longer clips."
        )
    library = import_extra("pesq", "eval", "PESQ")
    try:
        return float(library.pesq(sample_rate_hz, reference, estimate, band))
    except library.PesqError as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode() if isinstance(reason, bytes) else reason
        raise NotComparableError(
            f"PESQ cannot judge this sound: {reason}. It needs speech in the reference."
        ) from error


def stoi(
    reference: Float[np.ndarray, "samples"],
    estimate: Float[np.ndarray, "estimated_samples"],
    sample_rate_hz: int,
) -> float:
    """Short-time objective intelligibility (Taal et al., 2011), about 0 (none) to 1 (all).

    By the library pystoi, which works at 10 kHz and resamples what has another rate.

    Args:
      reference: the clean speech.
      estimate: what is judged, as long as the reference.
      sample_rate_hz: of both.

    Raises:
      NotComparableError: if a waveform is silent, lengths differ, or the reference has less than
        0.4 s that is not silent.
      UserError: if pystoi is not installed.
    """
    _check(reference, estimate)
    library = import_extra("pystoi", "eval", "STOI")
    with warnings.catch_warnings():
        # The library only warns of what it cannot compare, and returns 1e-5 as if it were bad.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(library.stoi(reference, estimate, sample_rate_hz, extended=False))
        except RuntimeWarning as warning:
            raise NotComparableError(
                f"STOI compares pieces of 0.4 s without silence, and this reference of "
                f"{len(reference)} samples at {sample_rate_hz} Hz has none; give longer clips."
            ) from warning


def si_sdr(
    reference: Float[np.ndarray, "samples"], estimate: Float[np.ndarray, "estimated_samples"]
) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, higher is better (Le Roux et al., 2019,
    1811.02508).

    10 log10(|a s|^2 / |a s - e|^2) with a = <e, s> / |s|^2, means taken off both first. Infinite if
    the estimate is a multiple of the reference, minus infinity if it has nothing of it.

    Args:
      reference: the clean sound (s).
      estimate: what is judged (e), as long as the reference.

    Raises:
      NotComparableError: if a waveform is silent or constant, or lengths differ.
    """
    _check(reference, estimate)
    clean = np.asarray(reference, np.float64)
    clean = clean - clean.mean()
    heard = np.asarray(estimate, np.float64)
    heard = heard - heard.mean()
    target = (heard @ clean) / (clean @ clean) * clean
    noise = heard - target
    with np.errstate(divide="ignore"):
        return float(10 * np.log10((target @ target) / (noise @ noise)))


def _check(reference: np.ndarray, estimate: np.ndarray) -> None:
    if reference.shape != estimate.shape:
        raise NotComparableError(
            f"the reference has {len(reference)} samples and the estimate {len(estimate)}; cut or "
            "pad them to one length where they belong together."
        )
    for name, wave in (("reference", reference), ("estimate", estimate)):
        if not np.isfinite(wave).all():
            raise NotComparableError(
                f"the {name} has samples that are not finite; look at how it was made."
            )
        if not len(wave) or np.abs(wave - wave.mean()).max() < _SILENCE:
            raise NotComparableError(
                f"the {name} is silent ({len(wave)} samples); there is nothing to compare. Leave "
                "the clip out, and say so."
            )


# ------------------------------------------------------------------------------
# How close clips come to themselves when they are made again from their spectrograms.


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


# ------------------------------------------------------------------------------
# Errors of transcripts: word error rate and character error rate, by jiwer.


@dataclasses.dataclass(frozen=True)
class TranscriptErrors:
    """Errors of a set of transcripts; 0 is best, and more than 1 is possible.

    Attributes:
      word_error_rate: (substitutions + deletions + insertions) / words of the references, over the
        whole set (the mean of clips' rates is another number).
      character_error_rate: the same of characters, spaces included.
      exact: share of transcripts without an error.
      transcripts: how many.
    """

    word_error_rate: float
    character_error_rate: float
    exact: float
    transcripts: int


def transcript_errors(predictions: Sequence[str], references: Sequence[str]) -> TranscriptErrors:
    """Compares transcripts as they are: case and punctuation count; whitespace at both ends and
    repeated ones do not.

    Args:
      predictions: one transcript per clip; may be empty.
      references: the right one of each clip.

    Raises:
      UserError: if there is none, their numbers differ, a reference has no word, or jiwer is not
        installed.
    """
    if not references or len(predictions) != len(references):
        raise UserError(
            f"{len(predictions)} transcripts do not go with {len(references)} references; give one "
            "for each, and at least one."
        )
    found, wanted = (
        [" ".join(text.split()) for text in texts]
        for texts in (
            predictions,
            references,
        )
    )
    for number, text in enumerate(wanted, start=1):
        if not text:
            raise UserError(f"reference {number} has no word; leave its clip out.")
    library = import_extra("jiwer", "eval", "the word error rate")
    return TranscriptErrors(
        word_error_rate=float(library.wer(wanted, found)),
        character_error_rate=float(library.cer(wanted, found)),
        exact=sum(map(str.__eq__, found, wanted)) / len(wanted),
        transcripts=len(wanted),
    )
