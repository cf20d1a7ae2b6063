"""Builds the optimiser: clipping, a gradient filter, a direction, weight decay, learning rate.

Every optimiser is a direction (what `optax.scale_by_...` makes of the gradients) with the same
decoupled weight decay and schedule after it, so that these mean the same whatever the direction.
"""

import functools
from typing import Any

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
from megatransformer_jax.training.grokfast import grokfast_ema, grokfast_ma
from megatransformer_jax.training.muon import check_muon, labels, scale_by_muon
from megatransformer_jax.training.parameter_groups import (
    check_groups,
    decay_rates,
    learning_rate_factors,
    scale_by_learning_rate,
)
from megatransformer_jax.training.schedules import build_schedule
from megatransformer_jax.training.weight_average import average_weights
from megatransformer_jax.training.weight_decay import add_decayed_weights


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

    Example:
      >>> optimizer = build_optimizer(OptimizerConfig(learning_rate=1e-3), total_steps=1000)
      >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """
    optimizer = optimizer_with_schedule(config, build_schedule(config, total_steps))
    return optimizer if ema_decay is None else average_weights(optimizer, ema_decay)


def optimizer_with_schedule(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The configured optimiser with another schedule than its own."""
    groups = parse_groups(config.groups)
    update = optax.chain(
        _direction(config),
        add_decayed_weights(functools.partial(decay_rates, groups, config.weight_decay)),
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
