"""Steps of a diffusion as pure arrays: noising, what networks predict, DDPM and DDIM.

Every function takes alpha_bar per medium, [N], and media [N, ...]. A network predicts the noise
(`epsilon`) or the velocity (`v`, sqrt(a) noise - sqrt(1 - a) clean, arXiv 2202.00512).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from megatransformer_jax.ops.diffusion_schedule import signal_to_noise

PREDICTIONS = ("epsilon", "v")


def per_medium(values: Float[Array, "N"], media: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
    """`values` with as many axes as `media`, so that they broadcast over each medium."""
    return values.reshape(values.shape + (1,) * (media.ndim - 1))


def add_noise(
    clean: Float[Array, "N ..."], noise: Float[Array, "N ..."], alpha_bar: Float[Array, "N"]
) -> Float[Array, "N ..."]:
    """sqrt(a) clean + sqrt(1 - a) noise."""
    a = per_medium(alpha_bar, clean)
    return jnp.sqrt(a) * clean + jnp.sqrt(1.0 - a) * noise


def prediction_target(
    prediction: str,
    clean: Float[Array, "N ..."],
    noise: Float[Array, "N ..."],
    alpha_bar: Float[Array, "N"],
) -> Float[Array, "N ..."]:
    """What a network of this kind should predict.

    Raises:
      ValueError: for a kind that `PREDICTIONS` does not list.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "v":
        a = per_medium(alpha_bar, clean)
        return jnp.sqrt(a) * noise - jnp.sqrt(1.0 - a) * clean
    raise ValueError(_unknown(prediction))


def predicted_clean(
    prediction: str,
    predicted: Float[Array, "N ..."],
    noisy: Float[Array, "N ..."],
    alpha_bar: Float[Array, "N"],
) -> Float[Array, "N ..."]:
    """The clean medium that a prediction means. Raises as `prediction_target`."""
    a = per_medium(alpha_bar, noisy)
    if prediction == "epsilon":
        return (noisy - jnp.sqrt(1.0 - a) * predicted) / jnp.sqrt(a)
    if prediction == "v":
        return jnp.sqrt(a) * noisy - jnp.sqrt(1.0 - a) * predicted
    raise ValueError(_unknown(prediction))


def implied_noise(
    clean: Float[Array, "N ..."], noisy: Float[Array, "N ..."], alpha_bar: Float[Array, "N"]
) -> Float[Array, "N ..."]:
    """The noise that makes `noisy` of `clean`; alpha_bar must be below 1."""
    a = per_medium(alpha_bar, noisy)
    return (noisy - jnp.sqrt(a) * clean) / jnp.sqrt(1.0 - a)


def min_snr_weight(
    prediction: str, alpha_bar: Float[Array, "N"], gamma: float
) -> Float[Array, "N"]:
    """Weight of the squared error: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v.

    Both make the weight of the clean medium's error min(SNR, gamma) (arXiv 2303.09556). Raises as
    `prediction_target`.
    """
    snr = signal_to_noise(alpha_bar)
    if prediction == "epsilon":
        return jnp.minimum(1.0, gamma / snr)
    if prediction == "v":
        return jnp.minimum(snr, gamma) / (snr + 1.0)
    raise ValueError(_unknown(prediction))


def ddpm_step(
    clean: Float[Array, "N ..."],
    noisy: Float[Array, "N ..."],
    noise: Float[Array, "N ..."],
    alpha_bar: Float[Array, "N"],
    next_alpha_bar: Float[Array, "N"],
) -> Float[Array, "N ..."]:
    """A draw from q(x_s | x_t, clean), the ancestral step (arXiv 2006.11239, equations 6 and 7).

    Args:
      clean: the clean media as predicted at t.
      noisy: x_t.
      noise: standard normal.
      alpha_bar: at t, below 1.
      next_alpha_bar: at s, an earlier time; any distance apart. At s = 0 the result is `clean`.
    """
    a_t, a_s = per_medium(alpha_bar, noisy), per_medium(next_alpha_bar, noisy)
    alpha = a_t / a_s
    of_clean = jnp.sqrt(a_s) * (1.0 - alpha) / (1.0 - a_t)
    of_noisy = jnp.sqrt(alpha) * (1.0 - a_s) / (1.0 - a_t)
    variance = (1.0 - a_s) / (1.0 - a_t) * (1.0 - alpha)
    return of_clean * clean + of_noisy * noisy + jnp.sqrt(variance) * noise


def ddim_step(
    clean: Float[Array, "N ..."],
    noisy: Float[Array, "N ..."],
    noise: Float[Array, "N ..."],
    alpha_bar: Float[Array, "N"],
    next_alpha_bar: Float[Array, "N"],
    eta: float,
) -> Float[Array, "N ..."]:
    """The step of DDIM (arXiv 2010.02502, equation 12); arguments as in `ddpm_step`.

    `eta` 0 adds no noise; 1 is the ancestral step.
    """
    a_t, a_s = per_medium(alpha_bar, noisy), per_medium(next_alpha_bar, noisy)
    variance = eta**2 * (1.0 - a_s) / (1.0 - a_t) * (1.0 - a_t / a_s)
    # Rounding may make it negative where it is 0.
    direction = jnp.sqrt(jnp.maximum(1.0 - a_s - variance, 0.0))
    towards = implied_noise(clean, noisy, alpha_bar)
    return jnp.sqrt(a_s) * clean + direction * towards + jnp.sqrt(variance) * noise


def dynamic_threshold(
    clean: Float[Array, "N ..."], quantile: float, is_valid: Bool[Array, "N ..."] | None = None
) -> Float[Array, "N ..."]:
    """Clips each medium to [-s, s] and divides by s (Imagen, arXiv 2205.11487).

    s is the quantile of the medium's absolute values, at least 1.

    Args:
      clean: predicted clean media, meant to be in [-1, 1].
      quantile: such as 0.995.
      is_valid: which values count, of a shape that broadcasts to that of `clean`. None: all.
    """
    magnitude = jnp.abs(clean)
    if is_valid is not None:
        magnitude = jnp.where(is_valid, magnitude, -1.0)
    ordered = jnp.sort(magnitude.reshape(len(clean), -1), axis=-1)
    # Values that do not count come first.
    count = jnp.sum(ordered >= 0, axis=-1)
    size = ordered.shape[-1]
    place = (size - count) + quantile * jnp.maximum(count - 1, 0)
    low = jnp.minimum(jnp.floor(place), size - 1)
    high = jnp.minimum(low + 1, size - 1)
    at_low, at_high = (
        jnp.take_along_axis(ordered, index.astype(jnp.int32)[:, None], axis=-1)[:, 0]
        for index in (low, high)
    )
    limit = per_medium(jnp.maximum(at_low + (place - low) * (at_high - at_low), 1.0), clean)
    return jnp.clip(clean, -limit, limit) / limit


def _unknown(prediction: str) -> str:
    return f"unknown prediction {prediction!r}; it must be one of {PREDICTIONS}."
