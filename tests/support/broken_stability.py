"""Broken rules of the terms that keep iterations stable, for run_rules_test.py."""

from typing import Any

from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig, StabilityConfig
from megatransformer_jax.config.run import RunConfig

# The rule, the class, what is given, the path in the error.
BROKEN_STABILITY: list[tuple[str, type, dict[str, Any], str]] = [
    (
        "_warmups_need_a_weight",
        StabilityConfig,
        {"jacobian_warmup_steps": 5},
        "jacobian_warmup_steps",
    ),
    (
        "_warmups_need_a_weight",
        StabilityConfig,
        {"jacobian_weight": 0.1, "fixed_point_warmup_steps": 5},
        "fixed_point_warmup_steps",
    ),
    (
        "_stability_needs_a_core",
        RunConfig,
        {
            "model": ModelConfig(core_layers=0),
            "train": TrainConfig(stability=StabilityConfig(jacobian_weight=0.1)),
        },
        "train.stability.jacobian_weight",
    ),
    (
        "_fixed_point_needs_two_iterations",
        RunConfig,
        {
            "model": ModelConfig(
                recurrence=RecurrenceConfig(sampling="fixed", mean_steps=1, backprop_depth=1)
            ),
            "train": TrainConfig(stability=StabilityConfig(fixed_point_weight=0.1)),
        },
        "train.stability.fixed_point_weight",
    ),
]
