"""How close sound is to a reference: PESQ, STOI, SI-SDR.

All compare a waveform with the clean one it should be, sample by sample, so they judge vocoders and
resynthesis. Sound that a model makes up has no such reference.
"""

import warnings

import numpy as np
from jaxtyping import Float

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.media.extra_library import import_for_scores

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
    library = import_for_scores("pesq", "PESQ")
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
    library = import_for_scores("pystoi", "STOI")
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
