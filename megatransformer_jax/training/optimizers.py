"""Builds the optimiser: clipping, a gradient filter, a direction, weight decay, learning rate.

Every optimiser is a direction (what `optax.scale_by_...` makes of the gradients) with the same
decoupled weight decay and schedule after it, so that these mean the same whatever the direction.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from megatransformer_jax.config.optimizer import (
    OPTIMIZERS,
    AdafactorConfig,
    GrokfastConfig,
    MuonConfig,
    OptimizerConfig,
    ParameterGroup,
    parse_groups,
)
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.training.muon import scale_by_configured_muon
from megatransformer_jax.training.trainable import map_named, path_text
from megatransformer_jax.training.transforms import (
    average_weights,
    check_muon,
    grokfast_ema,
    grokfast_ma,
    labels,
    scale_by_muon,
)

# ------------------------------------------------------------------------------
# The optimiser.


def build_optimizer(
    config: OptimizerConfig, total_steps: int, ema_decay: float | None = None
) -> optax.GradientTransformation:
    """The configured optimiser with its learning-rate schedule.

    Its state is float32 whatever the gradients are. Each learning rate is the schedule's value at
    the number of updates applied so far.

    Args:
      config: which optimiser.
      total_steps: of the run, for the schedule.
      ema_decay: `train.ema_decay`; the average is in the state, see `evaluation_params`.

    Raises:
      ValueError: if the optimiser's name is unknown.
      ConfigError: from its `init`, if a parameter group decides for no parameter, or Muon acts on
        none.

    Examples:
      >>> optimizer = build_optimizer(OptimizerConfig(learning_rate=1e-3), total_steps=1000)
      >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """
    schedule = build_schedule(config, total_steps)
    optimizer = optimizer_with_schedule(config, schedule, total_steps)
    return optimizer if ema_decay is None else average_weights(optimizer, ema_decay)


def optimizer_with_schedule(
    config: OptimizerConfig, schedule: optax.Schedule, total_steps: int
) -> optax.GradientTransformation:
    """The configured optimiser with another schedule than its own."""
    groups = parse_groups(config.groups)
    update = optax.chain(
        _direction(config),
        add_decayed_weights(
            functools.partial(decay_rates, groups, config.weight_decay),
            fades_over=total_steps if config.weight_decay_schedule == "linear" else None,
            is_cautious=config.cautious_decay,
        ),
        scale_by_learning_rate(
            schedule,
            functools.partial(_rate_factors, config, groups),
            functools.partial(_check, config, groups),
        ),
    )
    if config.is_schedule_free:
        # Its steps count from 1. The weights of the average must be those of the rates used.
        update = optax.contrib.schedule_free(
            update, learning_rate=lambda count: schedule(count - 1), b1=config.beta1
        )
    # The state has the same structure with and without clipping: a resumed run may change it.
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    if config.grokfast.filter == "none":
        return optax.chain(clip, update)
    # Clipped first, so that one large gradient does not fill the average.
    return optax.chain(clip, _filter(config.grokfast), update)


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = functools.partial(
        optax.scale_by_adam, b1=config.beta1, b2=config.beta2, eps=config.eps, mu_dtype=jnp.float32
    )
    match config.name:
        case "adamw":
            return adam()
        case "adafactor":
            return _adafactor(config.adafactor)
        case "lion":
            return optax.scale_by_lion(config.beta1, config.beta2, mu_dtype=jnp.float32)
        case "muon":
            return optax.partition({"muon": _muon(config.muon), "adamw": adam()}, labels)
        case "sgd":
            sgd = config.sgd
            return optax.trace(sgd.momentum, sgd.nesterov) if sgd.momentum else optax.identity()
        case "schedule_free_adamw":
            # AdamW without its first moment, whose part the average takes.
            return optax.scale_by_rms(
                config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True
            )
        case "schedule_free_sgd":
            return optax.identity()
    raise ValueError(f"unknown optimiser {config.name!r}; known: {', '.join(OPTIMIZERS)}")


def _adafactor(config: AdafactorConfig) -> optax.GradientTransformation:
    clip = optax.identity() if config.clip_rms is None else optax.clip_by_block_rms(config.clip_rms)
    scale = optax.scale_by_param_block_rms() if config.scale_by_parameter else optax.identity()
    second_moment = optax.scale_by_factored_rms(
        decay_rate=config.decay_power, min_dim_size_to_factor=config.min_factored_size
    )
    return optax.chain(second_moment, clip, scale)


def _muon(config: MuonConfig) -> optax.GradientTransformation:
    if not config.is_plain:
        return scale_by_configured_muon(config)
    return scale_by_muon(
        config.momentum, config.nesterov, config.newton_schulz_steps, config.consistent_rms
    )


def _filter(config: GrokfastConfig) -> optax.GradientTransformation:
    if config.filter == "ema":
        return grokfast_ema(config.alpha, config.lamb)
    return grokfast_ma(config.window, config.lamb, config.warmup)


def _check(config: OptimizerConfig, groups: tuple[ParameterGroup, ...], params: Any) -> None:
    check_groups(groups, params)
    if config.name == "muon":
        check_muon(params)


def _rate_factors(config: OptimizerConfig, groups: tuple[ParameterGroup, ...], params: Any) -> Any:
    factors = learning_rate_factors(groups, params)
    if config.name != "muon":
        return factors
    return jax.tree.map(
        lambda factor, label: (
            factor * (config.muon.adamw_learning_rate if label == "adamw" else 1.0)
        ),
        factors,
        labels(params),
    )


# ------------------------------------------------------------------------------
# Learning rate as a function of the step.
#
# Every schedule warms up linearly, reaches the peak at the last warmup step and its last value at
# the last step of the run, so that the first step already learns and the last one is the smallest.


def build_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The configured schedule, for a run of `total_steps` steps counted from 0.

    Returns:
      A function from the step (int or int32 []) to the learning rate, float32 [].

    Raises:
      ValueError: if the name is unknown or warmup and decay do not fit into the run.
    """
    decay_steps = config.num_decay_steps(total_steps)
    if config.warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"warmup_steps={config.warmup_steps} + {decay_steps} steps of decay exceed the "
            f"{total_steps} steps of the run; shorten them."
        )
    match config.schedule:
        case "warmup_cosine":
            shape = _cosine(config.warmup_steps, total_steps, config.final_fraction)
        case "wsd":
            shape = _stable_then_decay(config, decay_steps, total_steps)
        case "constant":
            shape = jnp.ones_like
        case _:
            raise ValueError(
                f"unknown schedule {config.schedule!r}; known: warmup_cosine, wsd, constant"
            )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1.0) / max(config.warmup_steps, 1))
        return jnp.float32(config.learning_rate) * warmup * shape(step)

    return schedule


def _cosine(warmup_steps: int, total_steps: int, final_fraction: float) -> optax.Schedule:
    """Half a cosine from 1 at the end of warmup to `final_fraction` at the last step."""
    span = max(total_steps - 1 - warmup_steps, 1)

    def shape(step: jax.Array) -> jax.Array:
        progress = jnp.clip((step - warmup_steps) / span, 0.0, 1.0)
        return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return shape


def _stable_then_decay(
    config: OptimizerConfig, decay_steps: int, total_steps: int
) -> optax.Schedule:
    """1 until the last `decay_steps` steps, then 1 - sqrt decay (arXiv 2405.18392) or linear."""

    def shape(step: jax.Array) -> jax.Array:
        progress = jnp.clip((step + 1.0 - (total_steps - decay_steps)) / decay_steps, 0.0, 1.0)
        fallen = progress if config.decay_shape == "linear" else jnp.sqrt(progress)
        return 1.0 - (1.0 - config.final_fraction) * fallen

    return shape


# ------------------------------------------------------------------------------
# Weight decay: which parameters have it, and the transformation that adds it.

# Leaf names of parameters without weight decay. Rank does not tell: a fused norm scale or a bias
# per head is a matrix by shape, and a fused kernel has three or four axes.
UNDECAYED_NAMES = (
    "scale",
    "bias",
    "embedding",
    "a_log",
    "dt_bias",
    "b_matrix",
    "c_matrix",
    "alpha",
)


def decay_mask(params: Any) -> Any:
    """A tree of bools: True where weight decay applies, which is on matrices.

    Vectors have none, nor has any parameter whose name is or ends in one of `UNDECAYED_NAMES`
    (`bias`, `qk_bias`, `scale`, ...).
    """
    return map_named(_is_decayed, params)


class FadingDecayState(NamedTuple):
    """State of a weight decay that falls from step to step."""

    count: Any  # int32 [], updates so far


def add_decayed_weights(
    rates: Callable[[Any], Any], fades_over: int | None = None, is_cautious: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Adds to each update its parameter times a rate of its own (`optax.add_decayed_weights`).

    Args:
      rates: from a tree of parameters, which may lack some, to a tree of floats. Where the rate is
        0 the update is left as it is.
      fades_over: updates over which all rates fall evenly to 0. None: they stay.
      is_cautious: adds nothing where update and parameter differ in sign.

    Examples:
      >>> decay = add_decayed_weights(lambda params: jax.tree.map(lambda p: 0.1, params))
      >>> optimizer = optax.chain(optax.scale_by_adam(), decay, optax.scale(-1e-3))
    """

    def init(params: Any) -> Any:
        del params
        return optax.EmptyState() if fades_over is None else FadingDecayState(jnp.int32(0))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("weight decay needs the parameters: update(updates, state, params)")
        share: Any = 1.0
        if fades_over is not None:
            share = jnp.maximum(0.0, 1.0 - state.count / fades_over)
            state = FadingDecayState(optax.safe_increment(state.count))

        def decayed(u: jax.Array, rate: float, p: jax.Array) -> jax.Array:
            if is_cautious:
                p = jnp.where(u * p >= 0, p, 0.0)
            # A fading share is a float32 array, which would widen narrower parameters.
            return u + jnp.asarray(share * rate * p, p.dtype)

        return jax.tree.map(decayed, updates, rates(updates), params), state

    decay = optax.GradientTransformation(init, update)
    return optax.masked(decay, lambda params: jax.tree.map(lambda rate: rate > 0, rates(params)))


def _is_decayed(path: str, leaf: Any) -> bool:
    name = path.rpartition("/")[2]
    undecayed = any(name == plain or name.endswith("_" + plain) for plain in UNDECAYED_NAMES)
    return not undecayed and jnp.ndim(leaf) > 1


# ------------------------------------------------------------------------------
# Learning rate and weight decay of each parameter: by its name, or by the group it is in.

_SHOWN = 12


def group_of(groups: Sequence[ParameterGroup], path: str) -> ParameterGroup | None:
    """The first group whose expression is found in the path, or None."""
    return next((group for group in groups if group.pattern.search(path)), None)


def decay_rates(groups: Sequence[ParameterGroup], weight_decay: float, params: Any) -> Any:
    """A tree of floats: the group's weight decay, or `weight_decay` on matrices and 0 elsewhere."""

    def rate(path: str, is_decayed: bool) -> float:
        group = group_of(groups, path)
        if group is not None and group.weight_decay is not None:
            return group.weight_decay
        return weight_decay if is_decayed else 0.0

    return map_named(rate, decay_mask(params))


def learning_rate_factors(groups: Sequence[ParameterGroup], params: Any) -> Any:
    """A tree of floats: the group's factor on the schedule, or 1."""

    def factor(path: str, _: Any) -> float:
        group = group_of(groups, path)
        return 1.0 if group is None or group.learning_rate is None else group.learning_rate

    return map_named(factor, params)


def check_groups(groups: Sequence[ParameterGroup], params: Any) -> None:
    """Checks that each group decides for some parameter.

    Raises:
      ConfigError: naming the group, with paths that there are.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [path_text(path) for path, _ in leaves]
    deciding = [group_of(groups, path) for path in paths]
    for group in groups:
        if any(group is decider for decider in deciding):
            continue
        matched = [path for path in paths if group.pattern.search(path)]
        reason = (
            f"matches only parameters of groups before it, such as {matched[0]}; put it before them"
            if matched
            else "matches no parameter; fix it. There are " + _some(paths)
        )
        raise ConfigError("optimizer.groups", f"{group.pattern.pattern!r} {reason}.")


def scale_by_learning_rate(
    schedule: optax.Schedule, factors: Callable[[Any], Any], check: Callable[[Any], None]
) -> optax.GradientTransformation:
    """Multiplies each update by -schedule(updates so far) times a factor of its own.

    The state is that of `optax.scale_by_learning_rate` with a schedule.

    Args:
      schedule: from the number of updates, int32 [], to a rate.
      factors: from a tree of parameters to a tree of floats.
      check: called with the whole tree of parameters when the state is made.

    Examples:
      >>> ones = lambda params: jax.tree.map(lambda p: 1.0, params)
      >>> rate = scale_by_learning_rate(optax.constant_schedule(0.1), ones, lambda params: None)
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        check(params)
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: optax.ScaleByScheduleState, params: Any = None
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        del params
        step_size = -schedule(state.count)
        scaled = jax.tree.map(
            lambda u, factor: u * jnp.asarray(step_size * factor, u.dtype),
            updates,
            factors(updates),
        )
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _some(paths: Sequence[str]) -> str:
    """A path for each last name, so that they show what kinds there are."""
    by_name: dict[str, str] = {}
    for path in paths:
        by_name.setdefault(path.rpartition("/")[2], path)
    shown = list(by_name.values())[:_SHOWN]
    return ", ".join(shown) + (" and others" if len(shown) < len(paths) else "")
