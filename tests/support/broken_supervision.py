"""Broken rules of a loss at every iteration and of the gate's targets, for run_rules_test.py."""

from typing import Any

from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import (
    ExitGateTrainingConfig,
    RecurrenceConfig,
    SupervisionConfig,
)
from megatransformer_jax.config.run import RunConfig

GAIN = {"target": "gain", "detach": True}
SUPERVISED = TrainConfig(supervision=SupervisionConfig(prior="uniform"))
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
]
