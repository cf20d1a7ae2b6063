"""The options by which commands name a finished model."""

from typing import Any

from megatransformer_jax.config.option import option


def step_option() -> Any:
    """Which checkpoint of a run."""
    return option(
        "latest",
        "Checkpoint of a run: latest, best (by checkpoint.best_metric) or the number of its step.",
    )


def precision_option() -> Any:
    """Type of activations."""
    return option(
        None,
        "Type of activations. None: as in training. auto: bfloat16 on accelerators, float32 on "
        "CPU.",
        choices=("auto", "float32", "bfloat16"),
    )


def param_dtype_option() -> Any:
    """Type of parameters in memory."""
    return option(
        "float32",
        "Type of a Huginn checkpoint's parameters in memory. stored: as they are in the file.",
        choices=("float32", "stored"),
    )


def weights_option() -> Any:
    """Averaged weights or those that are trained."""
    return option(
        "average",
        "Of a run that averages its weights (train.ema_decay, schedule-free): average, or raw for "
        "the weights it trains.",
        choices=("average", "raw"),
    )
