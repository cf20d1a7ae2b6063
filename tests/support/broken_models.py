"""Broken rules of the model's options, for config_rules_test.py."""

from typing import Any

from megatransformer_jax.config.layers import (
    AttentionConfig,
    PeerConfig,
    PositionConfig,
    RotaryScalingConfig,
    SharingConfig,
)
from megatransformer_jax.config.model import InitConfig, MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.config.recurrence import ExitGateConfig, RecurrenceConfig

# The rule, the class, what is given, the path in the error.
BROKEN_MODELS: list[tuple[str, type, dict[str, Any], str]] = [
    (
        "_kv_heads_divide_heads",
        AttentionConfig,
        {"num_heads": 4, "num_kv_heads": 3},
        "num_kv_heads",
    ),
    (
        "_norm_options_need_the_norm",
        AttentionConfig,
        {"qk_norm_span": "width"},
        "qk_norm_span",
    ),
    (
        "_rotary_options_need_rotary",
        PositionConfig,
        {"scheme": "alibi", "rotary_base": 500.0},
        "rotary_base",
    ),
    (
        "_rotary_options_need_rotary",
        PositionConfig,
        {"scheme": "none", "scaling": RotaryScalingConfig("linear", 2.0)},
        "scaling.kind",
    ),
    (
        "_scaling_is_of_the_kind",
        RotaryScalingConfig,
        {"kind": "llama3", "factor": 2.0, "beta_slow": 2.0},
        "beta_slow",
    ),
    ("_scaling_is_of_the_kind", RotaryScalingConfig, {"kind": "yarn"}, "factor"),
    (
        "_bounds_are_in_order",
        RotaryScalingConfig,
        {"kind": "llama3", "factor": 2.0, "low_freq_factor": 4.0},
        "low_freq_factor",
    ),
    (
        "_rotary_options_need_rotary",
        PositionConfig,
        {"scheme": "none", "rotary_convention": "interleaved"},
        "rotary_convention",
    ),
    ("_bias_needs_layernorm", NormConfig, {"bias": True}, "bias"),
    ("_std_needs_a_scheme_that_reads_it", InitConfig, {"scheme": "takase", "std": 0.1}, "std"),
    ("_depths_fit_max_steps", RecurrenceConfig, {"mean_steps": 9, "max_steps": 8}, "mean_steps"),
    (
        "_depths_fit_max_steps",
        RecurrenceConfig,
        {"backprop_depth": 9, "max_steps": 8},
        "backprop_depth",
    ),
    ("_input_reaches_the_core", RecurrenceConfig, {"adapter": "none"}, "state_init"),
    ("_norm_needs_a_gate", ExitGateConfig, {"norm": False}, "norm"),
    (
        "_zero_order_hold_needs_diagonal",
        RecurrenceConfig,
        {"zero_order_hold": True},
        "zero_order_hold",
    ),
    (
        "_sigma_needs_lognormal",
        RecurrenceConfig,
        {"sampling": "fixed", "sampling_sigma": 1.0},
        "sampling_sigma",
    ),
    (
        "_uniform_fits_max_steps",
        RecurrenceConfig,
        {"sampling": "uniform", "mean_steps": 8, "max_steps": 14},
        "max_steps",
    ),
    ("_ramp_options_go_together", RecurrenceConfig, {"ramp": "linear"}, "ramp_steps"),
    ("_ramp_options_go_together", RecurrenceConfig, {"ramp_steps": 5}, "ramp_steps"),
    ("_ramp_options_go_together", RecurrenceConfig, {"ramp_from": 2}, "ramp_from"),
    (
        "_ramp_starts_below_the_mean",
        RecurrenceConfig,
        {"ramp": "linear", "ramp_steps": 5, "ramp_from": 9},
        "ramp_from",
    ),
    ("_unroll_fits_backprop_depth", RecurrenceConfig, {"unroll": 5, "backprop_depth": 4}, "unroll"),
    ("_heads_fit_widths", ModelConfig, {"width": 130}, "width"),
    (
        "_heads_fit_widths",
        ModelConfig,
        {"recurrence": RecurrenceConfig(core_width=90)},
        "recurrence.core_width",
    ),
    (
        "_heads_fit_widths",
        ModelConfig,
        {"width": 60, "attention": AttentionConfig(num_heads=4)},
        "attention.head_dim",
    ),
    (
        "_heads_fit_widths",
        ModelConfig,
        {"attention": AttentionConfig(head_dim=31)},
        "attention.head_dim",
    ),
    (
        "_sinusoidal_width_is_even",
        ModelConfig,
        {
            "width": 63,
            "positions": PositionConfig(scheme="sinusoidal"),
            "attention": AttentionConfig(num_heads=7),
        },
        "width",
    ),
    (
        "_scheme_and_counts_go_together",
        SharingConfig,
        {"core_unique": 1},
        "core_unique",
    ),
    ("_scheme_and_counts_go_together", SharingConfig, {"scheme": "cycle"}, "scheme"),
    (
        "_windows_have_layers",
        ModelConfig,
        {"core_layers": 2, "attention": AttentionConfig(core_windows=(1, 2, 3))},
        "attention.core_windows",
    ),
    (
        "_windows_have_layers",
        ModelConfig,
        {
            "core_layers": 2,
            "scan_layers": True,
            "sharing": SharingConfig(scheme="cycle", core_unique=1),
            "attention": AttentionConfig(core_windows=(1, 2)),
        },
        "attention.core_windows",
    ),
    (
        "_unique_layers_are_layers",
        ModelConfig,
        {"core_layers": 2, "sharing": SharingConfig(scheme="cycle", core_unique=3)},
        "sharing.core_unique",
    ),
    (
        "_unique_layers_are_layers",
        ModelConfig,
        {"core_layers": 2, "sharing": SharingConfig(scheme="cycle", core_unique=2)},
        "sharing.scheme",
    ),
    (
        "_residual_fits_the_norms",
        ModelConfig,
        {"residual": "rezero", "norm": NormConfig(placement="sandwich")},
        "norm.placement",
    ),
    ("_residual_fits_the_norms", ModelConfig, {"residual": "admin"}, "norm.placement"),
    (
        "_residual_fits_the_norms",
        ModelConfig,
        {
            "residual": "admin",
            "norm": NormConfig(placement="post"),
            "sharing": SharingConfig(scheme="cycle", core_unique=1),
        },
        "sharing.scheme",
    ),
    (
        "_scanned_stacks_have_layers",
        ModelConfig,
        {"scan_layers": True, "core_layers": 1},
        "scan_layers",
    ),
    ("_experts_are_a_square", PeerConfig, {"num_experts": 1000}, "num_experts"),
    ("_top_k_fits_the_half_keys", PeerConfig, {"num_experts": 225}, "top_k"),
    ("_queries_have_halves", PeerConfig, {"key_dim": 3}, "key_dim"),
    (
        "_momentum_needs_batch_norm",
        PeerConfig,
        {"query_norm": "layer", "query_momentum": 0.5},
        "query_momentum",
    ),
    ("_options_are_of_the_kind", MlpConfig, {"peer": PeerConfig(top_k=2)}, "peer"),
    (
        "_options_are_of_the_kind",
        MlpConfig,
        {"kind": "peer", "hidden_width": 100},
        "hidden_width",
    ),
    ("_options_are_of_the_kind", MlpConfig, {"kind": "peer", "bias": True}, "bias"),
    (
        "_has_layers",
        ModelConfig,
        {"prelude_layers": 0, "core_layers": 0, "coda_layers": 0},
        "prelude_layers",
    ),
    (
        "_recurrence_needs_a_core",
        ModelConfig,
        {"core_layers": 0, "recurrence": RecurrenceConfig(mean_steps=4)},
        "recurrence",
    ),
    (
        "_gate_needs_a_core",
        ModelConfig,
        {"core_layers": 0, "exit_gate": ExitGateConfig(enabled=True)},
        "exit_gate.enabled",
    ),
    ("_head_bias_needs_its_own_head", ModelConfig, {"head_bias": True}, "head_bias"),
]
