"""Broken rules of puzzles and of attention over whole rows, for `run_rules_test`."""

from typing import Any

from megatransformer_jax.config.data import DataConfig, ReasoningConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import EvaluationConfig, GeneratedConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.run import RunConfig

WHOLE_ROWS = AttentionConfig(is_causal=False)

BROKEN_PUZZLES: list[tuple[str, type, dict[str, Any], str]] = [
    (
        "_windows_look_back",
        AttentionConfig,
        {"is_causal": False, "core_windows": (4,)},
        "core_windows",
    ),
    (
        "_media_are_read_in_order",
        ModelConfig,
        {"image": ImageConfig(enabled=True), "attention": WHOLE_ROWS},
        "attention.is_causal",
    ),
    (
        "_answers_are_not_in_sight",
        RunConfig,
        {"model": ModelConfig(attention=WHOLE_ROWS)},
        "model.attention.is_causal",
    ),
    (
        "_answers_are_not_in_sight",
        RunConfig,
        {
            "model": ModelConfig(attention=WHOLE_ROWS),
            "data": DataConfig(source="reasoning", reasoning=ReasoningConfig(task="addition")),
        },
        "model.attention.is_causal",
    ),
    (
        "_answers_are_not_in_sight",
        RunConfig,
        {
            "data": DataConfig(
                source="reasoning", reasoning=ReasoningConfig(task="maze", eval_max_length=17)
            )
        },
        "model.attention.is_causal",
    ),
    (
        "_answers_are_not_in_sight",
        RunConfig,
        {
            "model": ModelConfig(attention=WHOLE_ROWS),
            "data": DataConfig(source="reasoning", reasoning=ReasoningConfig(task="hop")),
            "evaluation": EvaluationConfig(generated=GeneratedConfig(metrics=("exact_match",))),
        },
        "evaluation.generated.metrics",
    ),
    (
        "_puzzles_have_a_largest_length",
        ReasoningConfig,
        {"task": "sudoku", "eval_max_length": 25},
        "eval_max_length",
    ),
]
