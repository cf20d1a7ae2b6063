"""When a token has iterated enough: exit criteria for adaptive depth.

After every iteration a criterion gives each token one value from what the core and the output did
in that iteration; the token is settled once its value passes a threshold. All but learned_gate need
no training. Most compare with the iteration before (arXiv 2502.05171, section 6.1); entropy, top1
and margin ask how sure the model is by now (arXiv 2607.20519). h is the core's raw state, p the
distribution that the logits give, p1 and p2 its largest two, H its entropy; a prime marks the
iteration before.

| criterion        | value of a token                         | settled if     | default |
|------------------|------------------------------------------|----------------|---------|
| fixed            | infinite                                 | never          | 0       |
| latent_diff      | |h - h'| / |h|                           | < threshold    | 0.03    |
| cosine           | 1 - cos(h, h')                           | < threshold    | 5e-4    |
| entropy_diff     | |H(p) - H(p')|, nats                     | < threshold    | 1e-3    |
| kl               | KL(p' || p), nats                        | < threshold    | 5e-4    |
| minp_kl          | the same, on p reduced by min-p          | < threshold    | 1e-6    |
| argmax_stability | iterations in a row that kept the argmax | >= threshold   | 5       |
| entropy          | H(p), nats                               | < threshold    | 0.1     |
| top1             | 1 - p1                                   | < threshold    | 0.05    |
| margin           | 1 - (p1 - p2)                            | < threshold    | 0.1     |
| learned_gate     | prod (1 - lambda), not having exited yet | < threshold    | 0.5     |

The defaults of those that compare are Huginn's. It has none for cosine: states of equal length that
differ by 0.03 in latent_diff have a cosine distance of 0.03^2 / 2, about 5e-4. How sure is sure
enough depends on model and task, so the defaults of entropy, top1 and margin are only where to
start from. lambda is what the model's trained exit gate says after an iteration (`nn.exit_gate`): a
token leaves once it would have exited with probability 1 - threshold, so by default at the median
of its exit distribution.

The first iteration has none before it. Its h' is the initial state, p' is uniform, H(p') counts as
100 nats and no argmax was kept. A value that is not a number never settles a token.

    criterion = exit_criterion("kl")
    memory = criterion.init(state, vocab_size)
    value, memory = criterion.measure(memory, Observation(state, logits))  # after each iteration
    settled = criterion.is_settled(value, threshold)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.config.option import UserError
from megatransformer_jax.models.gate_readout import GateReadout
from megatransformer_jax.nn.adapters import log_continue

# More than any vocabulary's largest entropy, so that no first iteration settles a token.
FIRST_ENTROPY = 100.0
# minp_kl: tokens less likely than this fraction of the likeliest one count as equal.
MIN_P = 0.1

# What a criterion keeps from one iteration to the next: a pytree whose leaves begin with [B, T].
Memory = Any


@struct.dataclass
class Observation:
    """What one iteration of the core led to.

    Attributes:
      latent: the core's raw state, before the final norm.
      logits: the next token's scores from that state. None if the criterion needs none.
      gate: logits of the exit gate from that state. None if the criterion needs none.
    """

    latent: Float[Array, "B T D"]
    logits: Float[Array, "B T V"] | None = None
    gate: Float[Array, "B T"] | None = None


@dataclasses.dataclass(frozen=True)
class ExitCriterion:
    """Pure functions that say, token by token, when to stop iterating. Hashable, so static in jit.

    Attributes:
      name: as in the configuration.
      needs_logits: whether `measure` reads the logits; computing them runs coda and head.
      default_threshold: used if the user gives none.
      init: (initial state [B, T, D], vocabulary size) -> memory before the first iteration.
      measure: (memory, observation) -> (value [B, T] float32, next memory). The memory keeps its
        structure, shapes and types, so it can be the carry of a loop. ValueError if logits or the
        gate are needed and missing.
      is_settled: (value [B, T], threshold [] or [B]) -> bool [B, T]. The threshold is traced.
      needs_gate: whether `measure` reads the exit gate, which not every model has.
      reads_logits: where `needs_logits`, whether this run does; traced. None: always.
    """

    name: str
    needs_logits: bool
    default_threshold: float
    init: Callable[[jax.Array, int], Memory]
    measure: Callable[[Memory, Observation], tuple[jax.Array, Memory]]
    is_settled: Callable[[jax.Array, jax.Array | float], jax.Array]
    needs_gate: bool = False
    reads_logits: Bool[Array, ""] | None = dataclasses.field(default=None, compare=False)


@struct.dataclass
class DepthRule:
    """How deep tokens go.

    Attributes:
      depth: most iterations, at least 1: for all or per sequence.
      threshold: of the criterion: for all or per sequence.
      min_depth: no token leaves earlier (unless its depth is less). Per token only for
        `evaluation.answers.pass_problems`, which cuts it into columns.
      criterion: when a token has settled.
      readout: what coda and head read, if not the last state; only with the criterion 'fixed'.
    """

    depth: Int[Array, ""] | Int[Array, "B"]
    threshold: Float[Array, ""] | Float[Array, "B"]
    min_depth: Int[Array, ""] | Int[Array, "B"] | Int[Array, "B T"]
    criterion: ExitCriterion = struct.field(pytree_node=False)
    readout: GateReadout | None = None

    @property
    def lets_tokens_differ(self) -> bool:
        """Whether tokens of one pass can have different numbers of iterations."""
        return self.criterion.name != "fixed" or jnp.ndim(self.depth) > 0


def exit_criterion(name: str) -> ExitCriterion:
    """The criterion of that name.

    Raises:
      UserError: if there is none.
    """
    if name not in EXIT_CRITERIA:
        known = ", ".join(EXIT_CRITERIA)
        raise UserError(f"unknown exit criterion {name!r}; choose one of {known}.")
    return EXIT_CRITERIA[name]


def _is_below(
    value: Float[Array, "B T"], threshold: Float[Array, ""] | Float[Array, "B"] | float
) -> Bool[Array, "B T"]:
    return value < jnp.asarray(threshold)[..., None]


def _is_reached(
    value: Float[Array, "B T"], threshold: Float[Array, ""] | Float[Array, "B"] | float
) -> Bool[Array, "B T"]:
    return value >= jnp.asarray(threshold)[..., None]


def _no_memory(state: Float[Array, "B T D"], vocab_size: int) -> tuple[()]:
    return ()


def _never(memory: tuple[()], observation: Observation) -> tuple[Float[Array, "B T"], tuple[()]]:
    # Infinity is below no threshold, not even an infinite one.
    return jnp.full(observation.latent.shape[:2], jnp.inf), memory


def _first_latent(state: Float[Array, "B T D"], vocab_size: int) -> Float[Array, "B T D"]:
    return state.astype(jnp.float32)


def _latent_diff(
    previous: Float[Array, "B T D"], observation: Observation
) -> tuple[Float[Array, "B T"], Float[Array, "B T D"]]:
    latent = observation.latent.astype(jnp.float32)
    change = jnp.linalg.norm(latent - previous, axis=-1)
    is_same = change == 0
    # Two zero states are the same; a state that has just become zero is infinitely far.
    size = jnp.where(is_same, 1.0, jnp.linalg.norm(latent, axis=-1))
    return change / size, latent


def _cosine(
    previous: Float[Array, "B T D"], observation: Observation
) -> tuple[Float[Array, "B T"], Float[Array, "B T D"]]:
    latent = observation.latent.astype(jnp.float32)
    before, now = _direction(previous), _direction(latent)
    # 1 - cos of unit vectors, without the cancellation: exactly 0 for the same state, never below.
    distance = 0.5 * jnp.sum(jnp.square(now - before), axis=-1)
    # Zero has no direction. Both zero: the same. One zero: as if at right angles, a distance of 1.
    is_zero_before, is_zero_now = (jnp.all(unit == 0, axis=-1) for unit in (before, now))
    return distance + 0.5 * (is_zero_before != is_zero_now), latent


def _direction(latent: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Scaled to length 1; zero stays zero."""
    # By the largest number first, so that no square overflows: a state that has run away would
    # have infinite length and hence no direction, as if it were zero.
    peak = jnp.max(jnp.abs(latent), axis=-1, keepdims=True)
    scaled = latent / jnp.where(peak == 0, 1.0, peak)
    # At least 1 now, unless the state is zero.
    return scaled / jnp.maximum(jnp.linalg.norm(scaled, axis=-1, keepdims=True), 1.0)


def _first_entropy(state: Float[Array, "B T D"], vocab_size: int) -> Float[Array, "B T"]:
    return jnp.full(state.shape[:2], FIRST_ENTROPY, jnp.float32)


def _entropy_diff(
    previous: Float[Array, "B T"], observation: Observation
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    entropy = _entropy_of(jax.nn.log_softmax(_logits(observation)))
    return jnp.abs(entropy - previous), entropy


def _entropy(memory: tuple[()], observation: Observation) -> tuple[Float[Array, "B T"], tuple[()]]:
    return _entropy_of(jax.nn.log_softmax(_logits(observation))), memory


def _entropy_of(log_probs: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    terms = jnp.exp(log_probs) * jnp.where(jnp.isneginf(log_probs), 0.0, log_probs)
    return -jnp.sum(terms, axis=-1)


def _top1(memory: tuple[()], observation: Observation) -> tuple[Float[Array, "B T"], tuple[()]]:
    return 1 - jnp.max(jax.nn.softmax(_logits(observation)), axis=-1), memory


def _margin(memory: tuple[()], observation: Observation) -> tuple[Float[Array, "B T"], tuple[()]]:
    probs = jax.nn.softmax(_logits(observation))
    first = jnp.max(probs, axis=-1)
    is_first = jnp.arange(probs.shape[-1]) == jnp.argmax(probs, axis=-1)[..., None]
    second = jnp.max(jnp.where(is_first, 0.0, probs), axis=-1)
    return 1 - (first - second), memory


def _uniform(state: Float[Array, "B T D"], vocab_size: int) -> Float[Array, "B T V"]:
    return jnp.full((*state.shape[:2], vocab_size), -math.log(vocab_size), jnp.float32)


def _kl(
    previous: Float[Array, "B T V"], observation: Observation
) -> tuple[Float[Array, "B T"], Float[Array, "B T V"]]:
    log_probs = jax.nn.log_softmax(_logits(observation))
    return _divergence(previous, log_probs), log_probs


def _minp_kl(
    previous: Float[Array, "B T V"], observation: Observation
) -> tuple[Float[Array, "B T"], Float[Array, "B T V"]]:
    # Huginn's reduction: unlikely tokens get 1/V each, then all are normalised again. What happens
    # in the tail no longer counts.
    log_probs = jax.nn.log_softmax(_logits(observation))
    is_unlikely = log_probs < jnp.max(log_probs, axis=-1, keepdims=True) + math.log(MIN_P)
    reduced = jnp.where(is_unlikely, -math.log(log_probs.shape[-1]), log_probs)
    log_probs = jax.nn.log_softmax(reduced)
    return _divergence(previous, log_probs), log_probs


def _divergence(
    previous: Float[Array, "B T V"], current: Float[Array, "B T V"]
) -> Float[Array, "B T"]:
    """KL(previous || current) in nats, of log-probabilities. Infinite if a token got impossible."""
    before, now = jnp.exp(previous), jnp.exp(current)
    ratio = jnp.where(before == 0, 0.0, previous - current)
    # The sums of `before` and `now` are both 1 but for rounding, which would be as large as small
    # thresholds. With both, every term is at least 0 and the rounding cancels.
    divergence = jnp.sum(before * ratio - before + now, axis=-1)
    return jnp.maximum(divergence, 0.0)


def _no_argmax(state: Float[Array, "B T D"], vocab_size: int) -> Memory:
    shape = state.shape[:2]
    return jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)


def _argmax_stability(
    memory: Memory, observation: Observation
) -> tuple[Float[Array, "B T"], Memory]:
    previous, kept = memory
    logits = _logits(observation)
    # -1, no choice: where logits are not a number or all are banned, the first index means nothing.
    has_choice = jnp.isfinite(jnp.max(logits, axis=-1))
    choice = jnp.where(has_choice, jnp.argmax(logits, axis=-1).astype(jnp.int32), -1)
    kept = jnp.where(has_choice & (choice == previous), kept + 1, 0.0)
    return kept, (choice, kept)


def _surely_there(state: Float[Array, "B T D"], vocab_size: int) -> Float[Array, "B T"]:
    return jnp.zeros(state.shape[:2], jnp.float32)


def _survival(
    log_survival: Float[Array, "B T"], observation: Observation
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    if observation.gate is None:
        raise ValueError(
            "the observation has no exit gate, but this exit criterion reads it; evaluate the "
            "model's gate in every iteration when the criterion's needs_gate is True."
        )
    gate = observation.gate.astype(jnp.float32)
    # An infinite gate comes from a state that has run away; it is not a wish to stop.
    log_survival = log_survival + log_continue(jnp.where(jnp.isfinite(gate), gate, jnp.nan))
    return jnp.exp(log_survival), log_survival


def _logits(observation: Observation) -> Float[Array, "B T V"]:
    if observation.logits is None:
        raise ValueError(
            "the observation has no logits, but this exit criterion compares outputs; compute the "
            "logits of every iteration when the criterion's needs_logits is True."
        )
    return observation.logits.astype(jnp.float32)


EXIT_CRITERIA = {
    criterion.name: criterion
    for criterion in (
        ExitCriterion("fixed", False, 0.0, _no_memory, _never, _is_below),
        ExitCriterion("latent_diff", False, 0.03, _first_latent, _latent_diff, _is_below),
        ExitCriterion("cosine", False, 5e-4, _first_latent, _cosine, _is_below),
        ExitCriterion("entropy_diff", True, 1e-3, _first_entropy, _entropy_diff, _is_below),
        ExitCriterion("kl", True, 5e-4, _uniform, _kl, _is_below),
        ExitCriterion("minp_kl", True, 1e-6, _uniform, _minp_kl, _is_below),
        ExitCriterion("argmax_stability", True, 5.0, _no_argmax, _argmax_stability, _is_reached),
        ExitCriterion("entropy", True, 0.1, _no_memory, _entropy, _is_below),
        ExitCriterion("top1", True, 0.05, _no_memory, _top1, _is_below),
        ExitCriterion("margin", True, 0.1, _no_memory, _margin, _is_below),
        ExitCriterion("learned_gate", False, 0.5, _surely_there, _survival, _is_below, True),
    )
}


# ------------------------------------------------------------------------------
# Several criteria in one.


def one_of(names: tuple[str, ...], code: Int[Array, ""] | Int[Array, "B"]) -> ExitCriterion:
    """The criterion that `code`, an index into `names`, chooses; thresholds are its own.

    Args:
      names: of the criteria that can be chosen.
      code: traced; of all rows or per row.
    """
    members = [exit_criterion(name) for name in names]

    def measure(memory: Any, observation: Observation) -> tuple[jax.Array, Any]:
        pairs = [
            member.measure(kept, observation) for member, kept in zip(members, memory, strict=True)
        ]
        return _chosen([value for value, _ in pairs], code), tuple(kept for _, kept in pairs)

    reads_logits = jnp.asarray([member.needs_logits for member in members])[code]
    return ExitCriterion(
        name="one_of",
        needs_logits=any(member.needs_logits for member in members),
        default_threshold=0.0,
        init=lambda state, size: tuple(member.init(state, size) for member in members),
        measure=measure,
        is_settled=lambda value, threshold: _chosen(
            [member.is_settled(value, threshold) for member in members], code
        ),
        needs_gate=any(member.needs_gate for member in members),
        reads_logits=jnp.any(reads_logits) if jnp.ndim(code) else reads_logits,
    )


def _chosen(values: list[jax.Array], code: jax.Array) -> jax.Array:
    chosen = values[0]
    for number, value in enumerate(values[1:], 1):
        is_chosen = code == number
        chosen = jnp.where(is_chosen[:, None] if jnp.ndim(code) else is_chosen, value, chosen)
    return chosen
