"""The law of the loss of models that loop, and its fit to the runs of a grid.

    L = E + A (N_once + r^phi N_rec)^-alpha + B D^-beta

E + B D^-beta is one number for each budget of tokens D, and is fitted as such; E, B and beta follow
with three budgets or more. phi and alpha minimise the squared residual over a grid of values, for
which all other numbers are linear. The interval of phi is the central 95% over resampled runs, of
which each number of loops keeps its number.
"""

import dataclasses

import numpy as np

PHIS = np.round(np.arange(-1.0, 2.0001, 0.02), 2)
ALPHAS = np.geomspace(0.02, 2.0, 81)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run's model and result."""

    loops: int
    tokens: int
    once: int
    iterated: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """The law's numbers.

    Attributes:
      phi: loop exponent.
      interval: of phi, 95%.
      alpha: exponent of the parameters.
      scale: A.
      floors: E + B D^-beta of each budget of tokens.
      residual: root of the mean squared residual of the loss.
      data: E, B and beta; None with fewer than three budgets.
    """

    phi: float
    interval: tuple[float, float]
    alpha: float
    scale: float
    floors: dict[int, float]
    residual: float
    data: tuple[float, float, float] | None


def fit_law(outcomes: list[Outcome], resamples: int = 1000, seed: int = 0) -> Fit:
    """Fits the law to the runs of a grid.

    Args:
      outcomes: at least two numbers of loops, and two sizes.
      resamples: of the interval.
      seed: of the resampling.
    """
    loops = np.array([one.loops for one in outcomes])
    budgets = np.array([one.tokens for one in outcomes])
    loss = np.array([one.loss for one in outcomes])
    groups = (budgets[:, None] == np.unique(budgets)).astype(float)
    powers = _powers(outcomes)
    weights = np.concatenate([np.ones((1, len(loss))), _resampled(loops, resamples, seed)])
    errors = _squared_errors(powers, loss, groups, weights)
    best = errors.reshape(len(weights), -1).argmin(axis=1)
    found = PHIS[np.unravel_index(best, errors.shape[1:])[0]]
    at_phi, at_alpha = np.unravel_index(best[0], errors.shape[1:])
    design = np.column_stack([powers[at_phi, at_alpha], groups])
    numbers = np.linalg.lstsq(design, loss, rcond=None)[0]
    alpha = float(ALPHAS[at_alpha])
    # The power is of parameters by their geometric mean, see `_powers`.
    scale = float(numbers[0] * _typical(outcomes) ** alpha)
    low, high = np.percentile(found[1:], (2.5, 97.5)) if resamples else (np.nan, np.nan)
    floors = dict(zip(map(int, np.unique(budgets)), map(float, numbers[1:]), strict=True))
    residual = float(np.sqrt(np.mean((design @ numbers - loss) ** 2)))
    interval = (float(low), float(high))
    return Fit(float(found[0]), interval, alpha, scale, floors, residual, _fit_data(floors))


def _typical(outcomes: list[Outcome]) -> float:
    return float(np.exp(np.mean([np.log(one.once + one.iterated) for one in outcomes])))


def _powers(outcomes: list[Outcome]) -> np.ndarray:
    """(N_once + r^phi N_rec)^-alpha, N in units of a typical size: [phis, alphas, runs]."""
    once, iterated, loops = (
        np.array([getattr(one, name) for one in outcomes], float)
        for name in ("once", "iterated", "loops")
    )
    sizes = (once + loops ** PHIS[:, None] * iterated) / _typical(outcomes)
    return np.asarray(sizes[:, None] ** -ALPHAS[:, None])


def _resampled(loops: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each run counts, [resamples, runs]; those of each number of loops among
    themselves."""
    rng, counts = np.random.default_rng(seed), np.zeros((resamples, len(loops)))
    for number in np.unique(loops):
        (members,) = np.nonzero(loops == number)
        drawn = rng.integers(len(members), size=(resamples, len(members)))
        for place, member in enumerate(members):
            counts[:, member] = (drawn == place).sum(axis=1)
    return counts


def _squared_errors(
    powers: np.ndarray, loss: np.ndarray, groups: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The least squared error with A >= 0 and a free floor per budget: [weights, phis, alphas]."""

    def centred(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Weighted sums of products after each budget's means are taken off."""
        total = np.einsum("wn,...n->w...", weights, left * right)
        for group in groups.T:
            own = weights * group
            size = np.maximum(own.sum(axis=1), 1e-9).reshape(-1, *(1,) * (total.ndim - 1))
            sums = (np.einsum("wn,...n->w...", own, side) for side in (left, right))
            total = total - next(sums) * next(sums) / size
        return np.asarray(total)

    of_powers = np.maximum(centred(powers, powers), 1e-12)
    shared = np.maximum(centred(powers, np.broadcast_to(loss, powers.shape)), 0.0)
    own = centred(loss, loss).reshape(-1, 1, 1)
    return np.asarray(own - shared**2 / of_powers)


def _fit_data(floors: dict[int, float]) -> tuple[float, float, float] | None:
    """E, B and beta of E + B D^-beta; None where they are not determined."""
    if len(floors) < 3:
        return None
    tokens, values = np.array(list(floors), float), np.array(list(floors.values()))
    best = None
    for beta in ALPHAS:
        design = np.column_stack([np.ones_like(tokens), (tokens / tokens[0]) ** -beta])
        numbers = np.linalg.lstsq(design, values, rcond=None)[0]
        error = float(np.sum((design @ numbers - values) ** 2))
        if best is None or error < best[0]:
            best = (error, float(numbers[0]), float(numbers[1] * tokens[0] ** beta), float(beta))
    assert best is not None
    return best[1:]
