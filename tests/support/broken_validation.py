"""Broken rules of what validation returns, for run_rules_test.py."""

from typing import Any

from broken_media_runs import RUN as MEDIA_RUN

from megatransformer_jax.config.data import DataConfig, ReasoningConfig
from megatransformer_jax.config.loop import CheckpointConfig, EvaluationConfig, GeneratedConfig
from megatransformer_jax.config.run import RunConfig

SCORED = {"metrics": ("exact_match",)}

# The rule, the class, what is given, the path in the error.
BROKEN_VALIDATION: list[tuple[str, type, dict[str, Any], str]] = [
    (
        "_best_metric_is_returned",
        RunConfig,
        {"checkpoint": CheckpointConfig(best_metric="validation/exact_accuracy")},
        "checkpoint.best_metric",
    ),
    (
        "_best_metric_is_returned",
        RunConfig,
        {"checkpoint": CheckpointConfig(best_metric="validation/bleu")},
        "checkpoint.best_metric",
    ),
    ("_metrics_are_different", GeneratedConfig, {"metrics": ("bleu", "bleu")}, "metrics"),
    ("_texts_are_generated_for_metrics", GeneratedConfig, {"num_texts": 2}, "num_texts"),
    ("_stops_have_text", GeneratedConfig, SCORED | {"stop": ("",)}, "stop"),
    (
        "_generated_texts_have_prompts",
        RunConfig,
        {"evaluation": EvaluationConfig(generated=GeneratedConfig(**SCORED))},
        "evaluation.generated.references",
    ),
    (
        "_generated_texts_have_prompts",
        RunConfig,
        {
            "data": DataConfig(source="reasoning"),
            "evaluation": EvaluationConfig(generated=GeneratedConfig(**SCORED)),
        },
        "evaluation.generated.metrics",
    ),
    (
        "_generated_texts_have_prompts",
        RunConfig,
        {
            "data": DataConfig(source="reasoning", reasoning=ReasoningConfig(task="hop")),
            "evaluation": EvaluationConfig(generated=GeneratedConfig(**SCORED, references="a")),
        },
        "evaluation.generated.references",
    ),
    (
        "_generated_texts_have_prompts",
        RunConfig,
        {
            **MEDIA_RUN,
            "evaluation": EvaluationConfig(generated=GeneratedConfig(**SCORED, references="a")),
        },
        "evaluation.generated.metrics",
    ),
]
