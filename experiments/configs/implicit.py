"""The implicit gradient of a core that settles, against truncated backpropagation.

Command:  megatransformer train --config=implicit
Variants, separated by commas after the file's name and a colon:
  truncated  backpropagation through the last 4 iterations in place of 4 terms of the implicit sum
  one        a single term, which is backpropagation through the last iteration alone
  settled    rows iterate until an iteration moves them by less than 1%, at most 16 times, and the
             sum has up to 16 terms
  mano       modular arithmetic (the task `mano`) in place of parity
  tiny       the same run in under a minute

The model is trained on up to 8 bits and judged on 9 to 16, with an attention window of 2, so that
bits travel by iterating (see reasoning.py).

Expected in 2 to 3 minutes of one CPU core, one seed: 1.000 exact answers at 16 iterations and more,
with both gradients; 0.775 at 8 iterations, and 0.979 with `truncated`. `settled` does not learn the
task. See docs/results/implicit.md.
The gradient of a finished run against that of all iterations:
  python -m benchmarks.implicit_gradient runs/implicit
"""

from typing import Any

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("tiny", "mano", "truncated", "one", "settled")
EXCLUSIVE = (("truncated", "one", "settled"),)


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS, EXCLUSIVE)
    suffix = "".join(f"_{name}" for name in VARIANTS if name in variants)
    config = ConfigDict(
        {
            "preset": "tiny",
            "workdir": f"runs/implicit{suffix}",
            "model": {
                "vocab_size": 4,
                "max_length": 64,
                "core_layers": 2,
                "scale_embeddings": True,
                "attention": {"window": 2},
                "mlp": {"hidden_width": 128},
                "recurrence": {
                    "adapter": "linear",
                    "state_init": "normal",
                    "mean_steps": 8,
                    "backprop_depth": 4,
                    "gradient": "implicit",
                },
            },
            "data": {
                "source": "reasoning",
                "batch_size": 64,
                "sequence_length": 17,
                "reasoning": {
                    "task": "parity",
                    "max_length": 8,
                    "eval_min_length": 9,
                    "eval_max_length": 16,
                },
            },
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50, "beta2": 0.98},
            "train": {"steps": 600},
            "checkpoint": {"every_steps": 200},
            "evaluation": {"every_steps": 200, "final_depths": (1, 2, 4, 8, 16, 32, 64)},
            "samples": {"every_steps": 0},
            "logging": {"every_steps": 25},
        }
    )
    if "mano" in variants:
        config.update(_MANO)
    if "tiny" in variants:
        config.update(_TINY)
    recurrence = config.model.recurrence
    if "truncated" in variants:
        recurrence.gradient = "truncated"
    if "one" in variants:
        recurrence.backprop_depth = 1
    if "settled" in variants:
        recurrence.update(
            {
                "sampling": "fixed",
                "mean_steps": 2 * recurrence.mean_steps,
                "backprop_depth": 2 * recurrence.mean_steps,
                "implicit_tolerance": 0.01,
            }
        )
    return config


# Under a minute.
_TINY: dict[str, Any] = {
    "model": {"recurrence": {"mean_steps": 4, "backprop_depth": 2}},
    "data": {"batch_size": 16, "reasoning": {"num_eval": 64}},
    "optimizer": {"warmup_steps": 10},
    "train": {"steps": 60},
    "checkpoint": {"every_steps": 30},
    "evaluation": {"every_steps": 30, "num_batches": 2, "final_depths": (1, 2, 4, 8)},
    "logging": {"every_steps": 5},
}

# All tokens see each other here, and the core's iterations need not go along the row.
_MANO: dict[str, Any] = {
    "model": {
        "vocab_size": 13,
        "attention": {"window": None},
        "recurrence": {"mean_steps": 6, "backprop_depth": 6},
    },
    "data": {
        "sequence_length": 9,
        "reasoning": {
            "task": "mano",
            "modulus": 7,
            "max_length": 3,
            "eval_min_length": 1,
            "eval_max_length": 3,
            "num_eval": 1024,
        },
    },
    "optimizer": {"warmup_steps": 100},
    "train": {"steps": 1500},
    "checkpoint": {"every_steps": 500},
    "evaluation": {"every_steps": 500, "final_depths": (1, 2, 4, 6, 8, 12, 24, 48)},
}
