"""The smallest run that still has everything: dropout, random depths, packing, checkpoints."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from megatransformer_jax.config.build import merge

SMALL_RUN: dict[str, Any] = {
    "model": {
        "vocab_size": 264,
        "width": 16,
        "core_layers": 1,
        "residual_dropout_rate": 0.1,
        "attention": {"num_heads": 2},
        "mlp": {"hidden_width": 16},
        "recurrence": {"mean_steps": 2, "max_steps": 6, "backprop_depth": 2},
    },
    "data": {
        "source": "embedded_text",
        "batch_size": 8,
        "sequence_length": 16,
        "tokenizer": {"kind": "bytes"},
    },
    "optimizer": {"warmup_steps": 2},
    "train": {"steps": 12},
    "checkpoint": {"every_steps": 4},
    "evaluation": {"every_steps": 8, "num_batches": 1, "final_depths": [1, 2, 4]},
    "samples": {"every_steps": 0},
    "logging": {"every_steps": 5, "progress": "lines"},
}


@pytest.fixture(scope="session")
def small_run() -> Callable[..., dict[str, Any]]:
    """Values of the small run, changed by nested values."""

    def values(workdir: Any, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        base = merge(copy.deepcopy(SMALL_RUN), {"workdir": str(workdir)})
        return merge(base, changes or {})

    return values
