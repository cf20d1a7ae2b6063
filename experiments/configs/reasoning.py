"""Running parity: a task on which more depth provably helps.

Command:  python -m experiments.train --config=experiments/configs/reasoning.py
Variants, separated by commas after the file's name and a colon:
  diagonal  the stable diagonal injection instead of the linear adapter
  tiny      the same run in under a minute

The model sees up to 16 bits in training and is judged on 17 to 32.
Expected on 2 CPU cores: under 15 minutes; exact-answer accuracy near chance at depth 1, and rising
with depth on problems longer than any trained on.
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.experiment import parse_variants

VARIANTS = ("tiny", "diagonal")


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    suffix = "".join(f"_{name}" for name in VARIANTS if name in variants)
    config = ConfigDict(
        {
            "preset": "tiny",
            "workdir": f"runs/reasoning{suffix}",
            "model": {
                "vocab_size": 16,
                "recurrence": {
                    "adapter": "diagonal" if "diagonal" in variants else "linear",
                    "iteration_norm": True,
                    "mean_steps": 8,
                    "backprop_depth": 8,
                },
            },
            "data": {
                "source": "reasoning",
                "batch_size": 64,
                "sequence_length": 48,
                "reasoning": {
                    "task": "parity",
                    "max_length": 16,
                    "eval_min_length": 17,
                    "eval_max_length": 32,
                },
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 100},
            "train": {"steps": 3000},
            "checkpoint": {"every_steps": 500},
            "evaluation": {"every_steps": 500, "final_depths": (1, 2, 4, 8, 16, 32)},
            "samples": {"every_steps": 0},  # The final table shows what the model can do.
            "logging": {"every_steps": 50},
        }
    )
    if "tiny" in variants:
        config.update(
            {
                "model": {"recurrence": {"mean_steps": 4, "backprop_depth": 2}},
                "data": {"batch_size": 16, "reasoning": {"num_eval": 64}},
                "optimizer": {"warmup_steps": 10},
                "train": {"steps": 60},
                "checkpoint": {"every_steps": 30},
                "evaluation": {"every_steps": 30, "num_batches": 2, "final_depths": (1, 2, 4, 8)},
                "logging": {"every_steps": 5},
            }
        )
    return config
