"""Broken rules of the options of diagnostics, for config_rules_test.py."""

from typing import Any

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.loop import DiagnosticsConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.run import RunConfig

# The rule, the class, what is given, the path in the error.
BROKEN_DIAGNOSTICS: list[tuple[str, type, dict[str, Any], str]] = [
    ("_what_is_shown_goes_with_steps", DiagnosticsConfig, {"kinds": ("activations",)}, "kinds"),
    ("_what_is_shown_goes_with_steps", DiagnosticsConfig, {"num_rows": 1}, "num_rows"),
    ("_what_is_shown_goes_with_steps", DiagnosticsConfig, {"num_steps": 4}, "num_steps"),
    (
        "_diagnosed_rows_are_in_the_batch",
        RunConfig,
        {"diagnostics": DiagnosticsConfig(5, num_rows=9), "data": DataConfig(batch_size=8)},
        "diagnostics.num_rows",
    ),
    (
        "_kinds_are_different",
        DiagnosticsConfig,
        {"every_steps": 5, "kinds": ("activations", "activations")},
        "kinds",
    ),
    (
        "_diagnostics_fit_the_model",
        RunConfig,
        {
            "model": ModelConfig(core_layers=0),
            "diagnostics": DiagnosticsConfig(5, kinds=("spectral_radius",)),
        },
        "diagnostics.kinds",
    ),
    (
        "_diagnostics_fit_the_model",
        RunConfig,
        {
            "model": ModelConfig(core_layers=0),
            "diagnostics": DiagnosticsConfig(5, num_steps=4),
        },
        "diagnostics.num_steps",
    ),
]
