"""How much of a clean signal is left at each time of a diffusion: alpha-bar, and the SNR.

Time runs from 0, clean, to 1, noise. A noisy signal is sqrt(a) clean + sqrt(1 - a) noise with
a = alpha_bar(time). With `num_times` T, only the times i / T exist, and a is the product of
1 - beta over the first i of T betas; with None every time does, and a is a formula.

- linear: betas rise linearly from 1e-4 to 0.02 for T = 1000, times 1000 / T for others (DDPM, arXiv
  2006.11239); its limit is a = exp(-(0.1 t + 9.95 t^2)) (arXiv 2011.13456).
- cosine: a = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) pi / 2), s = 0.008 (arXiv 2102.09672).
- sigmoid: a = (g(1) - g(t)) / (g(1) - g(0)), g(t) = sigmoid(-3 + 6 t) (arXiv 2212.11972).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

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
