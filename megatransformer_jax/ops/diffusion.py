"""Diffusion and flow matching as pure arrays: schedules, noising, what networks predict, steps.

Time runs from 0, clean, to 1, noise. Functions of a diffusion take alpha_bar per medium, [N], and
media [N, ...]. A network predicts the noise (`epsilon`) or the velocity (`v`, sqrt(a) noise -
sqrt(1 - a) clean, arXiv 2202.00512).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

# ------------------------------------------------------------------------------
# Noising, predictions and steps of a diffusion.

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


# ------------------------------------------------------------------------------
# How much of a clean signal is left at each time of a diffusion: alpha-bar, and the SNR.
#
# Time runs from 0, clean, to 1, noise. A noisy signal is sqrt(a) clean + sqrt(1 - a) noise with
# a = alpha_bar(time). With `num_times` T, only the times i / T exist, and a is the product of
# 1 - beta over the first i of T betas; with None every time does, and a is a formula.
#
# - linear: betas rise linearly from 1e-4 to 0.02 for T = 1000, times 1000 / T for others (DDPM,
# arXiv
#   2006.11239); its limit is a = exp(-(0.1 t + 9.95 t^2)) (arXiv 2011.13456).
# - cosine: a = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) pi / 2), s = 0.008 (arXiv 2102.09672).
# - sigmoid: a = (g(1) - g(t)) / (g(1) - g(0)), g(t) = sigmoid(-3 + 6 t) (arXiv 2212.11972).

SCHEDULES = ("linear", "cosine", "sigmoid")
# No beta exceeds this, or nothing at all of the signal would be left at time 1.
MAX_BETA = 0.999
# The same for formulas.
MIN_ALPHA_BAR = 1e-5
COSINE_OFFSET = 0.008
SIGMOID_RANGE = (-3.0, 3.0)


@dataclasses.dataclass(frozen=True)
class DiffusionSchedule:
    """A schedule: `kind` is one of `SCHEDULES`, `num_times` is T or None for continuous time."""

    kind: str
    num_times: int | None

    def alpha_bar(self, time: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Share of the signal's variance at each time, float32; 1 at time 0.

        Raises:
          ValueError: for a kind that `SCHEDULES` does not list.
        """
        if self.num_times is None:
            return jnp.clip(_curve(self.kind, time, jnp), MIN_ALPHA_BAR, 1.0)
        table = jnp.asarray(alpha_bar_table(self.kind, self.num_times), jnp.float32)
        return table[jnp.round(time * self.num_times).astype(jnp.int32)]

    def draw_time(self, key: Key[Array, ""]) -> Float[Array, ""]:
        """A time above 0, all alike."""
        if self.num_times is None:
            return 1.0 - jax.random.uniform(key)
        return jax.random.randint(key, (), 1, self.num_times + 1) / jnp.float32(self.num_times)

    def sampling_times(self, num_steps: int) -> np.ndarray:
        """Times 1 > ... > 0 between which a sampler steps, float32 [num_steps + 1].

        Raises:
          ValueError: for more steps than there are times.
        """
        times = np.linspace(1.0, 0.0, num_steps + 1)
        if self.num_times is None:
            return times.astype(np.float32)
        if num_steps > self.num_times:
            raise ValueError(
                f"num_steps is {num_steps}, but the diffusion has {self.num_times} times; take at "
                "most one step per time."
            )
        return (np.round(times * self.num_times) / self.num_times).astype(np.float32)


@functools.cache
def alpha_bar_table(kind: str, num_times: int) -> np.ndarray:
    """alpha_bar at times 0, 1/T, ..., 1, float64 [T + 1].

    Raises:
      ValueError: for a kind that `SCHEDULES` does not list.
    """
    if kind == "linear":
        betas = np.linspace(1e-4, 0.02, num_times) * (1000 / num_times)
    else:
        curve = _curve(kind, np.arange(num_times + 1) / num_times, np)
        betas = 1.0 - curve[1:] / curve[:-1]
    alphas = 1.0 - np.minimum(betas, MAX_BETA)
    return np.concatenate(([1.0], np.cumprod(alphas)))


def signal_to_noise(alpha_bar: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """alpha_bar / (1 - alpha_bar); infinite at time 0."""
    return alpha_bar / (1.0 - alpha_bar)


def _curve(kind: str, time: Any, xp: Any) -> Any:
    """The formula of a schedule; `xp` is NumPy or jax.numpy."""
    match kind:
        case "linear":
            return xp.exp(-(0.1 * time + 0.5 * 19.9 * xp.square(time)))
        case "cosine":

            def squared_cosine(at: Any) -> Any:
                angle = (at + COSINE_OFFSET) / (1 + COSINE_OFFSET) * (np.pi / 2)
                return xp.square(xp.cos(angle))

            return squared_cosine(time) / squared_cosine(0.0)
        case "sigmoid":
            first, last = SIGMOID_RANGE

            def sigmoid(at: Any) -> Any:
                return 1.0 / (1.0 + xp.exp(-(first + (last - first) * at)))

            return (sigmoid(1.0) - sigmoid(time)) / (sigmoid(1.0) - sigmoid(0.0))
    raise ValueError(f"unknown schedule {kind!r}; it must be one of {SCHEDULES}.")


# ------------------------------------------------------------------------------
# Rectified flow (arXiv 2209.03003): straight paths from media to noise, and their velocity.

TIME_DRAWS = ("uniform", "logit_normal")


def flow_noisy(
    clean: Float[Array, "N ..."], noise: Float[Array, "N ..."], time: Float[Array, "N"]
) -> Float[Array, "N ..."]:
    """(1 - t) clean + t noise."""
    t = per_medium(time, clean)
    return (1.0 - t) * clean + t * noise


def flow_velocity(
    clean: Float[Array, "N ..."], noise: Float[Array, "N ..."]
) -> Float[Array, "N ..."]:
    """noise - clean, the derivative of `flow_noisy` by t: what a network predicts."""
    return noise - clean


def draw_flow_time(draw: str, mean: float, std: float, key: Key[Array, ""]) -> Float[Array, ""]:
    """A time in [0, 1].

    Args:
      draw: 'uniform', or 'logit_normal': the sigmoid of a normal (arXiv 2403.03206), which favours
        the middle.
      mean: of the normal; not used by 'uniform'.
      std: the same.
      key: of the draw.

    Raises:
      ValueError: for a draw that `TIME_DRAWS` does not list.
    """
    match draw:
        case "uniform":
            return jax.random.uniform(key)
        case "logit_normal":
            return jax.nn.sigmoid(mean + std * jax.random.normal(key))
    raise ValueError(f"unknown draw of times {draw!r}; it must be one of {TIME_DRAWS}.")


def euler_step(
    noisy: Float[Array, "N ..."],
    velocity: Float[Array, "N ..."],
    time: Float[Array, ""],
    next_time: Float[Array, ""],
) -> Float[Array, "N ..."]:
    """x + (s - t) velocity: along the flow from time t to s."""
    return noisy + (next_time - time) * velocity


def heun_step(
    noisy: Float[Array, "N ..."],
    velocity: Float[Array, "N ..."],
    next_velocity: Float[Array, "N ..."],
    time: Float[Array, ""],
    next_time: Float[Array, ""],
) -> Float[Array, "N ..."]:
    """Euler's step with the mean of the velocities at both its ends; the second is that where
    Euler's step arrives."""
    return euler_step(noisy, 0.5 * (velocity + next_velocity), time, next_time)


def flow_times(num_steps: int) -> Float[Array, "steps"]:
    """Times 1 > ... > 0 between which a sampler steps, [num_steps + 1]."""
    return jnp.linspace(1.0, 0.0, num_steps + 1)
