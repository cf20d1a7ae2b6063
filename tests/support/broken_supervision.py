"""Broken rules of a loss at every iteration, of gates and of the implicit gradient, for
run_rules_test.py."""

from typing import Any

from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import (
    ExitGateTrainingConfig,
    RecurrenceConfig,
    StabilityConfig,
    SupervisionConfig,
)
from megatransformer_jax.config.run import RunConfig

GAIN = {"target": "gain", "detach": True}
SUPERVISED = TrainConfig(supervision=SupervisionConfig(prior="uniform"))
IMPLICIT = {"gradient": "implicit"}
NOT_INJECTED = {"adapter": "none", "state_init": "none", "backprop_depth": 8}
# The rule, the class, what is given, the path in the error.
BROKEN_SUPERVISION: list[tuple[str, type, dict[str, Any], str]] = [
    ("_gain_has_no_prior", ExitGateTrainingConfig, GAIN | {"kl_weight": 0.1}, "kl_weight"),
    ("_gain_is_the_target", ExitGateTrainingConfig, {"gain_slope": 9.0}, "gain_slope"),
    ("_gain_trains_the_gate_alone", ExitGateTrainingConfig, {"target": "gain"}, "detach"),
    ("_options_need_a_prior", SupervisionConfig, {"mix": 0.5}, "mix"),
    (
        "_one_pass_has_one_depth",
        SupervisionConfig,
        {"prior": "uniform", "max_steps": 4},
        "max_steps",
    ),
    ("_prior_mean_goes_with_geometric", SupervisionConfig, {"prior": "geometric"}, "prior_mean"),
    *(
        ("_supervision_fits_the_run", RunConfig, values | {"train": SUPERVISED}, path)
        for values, path in (
            ({}, "model.recurrence.sampling"),
            ({"model": ModelConfig(core_layers=0)}, "train.supervision.prior"),
            (
                {"model": ModelConfig(recurrence=RecurrenceConfig(mean_steps=1, sampling="fixed"))},
                "train.supervision.prior",
            ),
        )
    ),
    *(
        ("_a_fixed_point_depends_on_the_input", RecurrenceConfig, values, path)
        for values, path in (
            ({"implicit_tolerance": 0.1}, "implicit_tolerance"),
            (IMPLICIT | NOT_INJECTED, "gradient"),
            (IMPLICIT | {"loop_scale": True}, "loop_scale"),
            (IMPLICIT | {"kept_every": 2}, "kept_every"),
        )
    ),
    (
        "_fixed_point_loss_sees_the_last_iteration",
        RunConfig,
        {
            "model": ModelConfig(recurrence=RecurrenceConfig(gradient="implicit")),
            "train": TrainConfig(stability=StabilityConfig(fixed_point_weight=0.1)),
        },
        "train.stability.fixed_point_weight",
    ),
]
