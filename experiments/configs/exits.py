"""A loss at every iteration, and when a token may stop: modular arithmetic and running parity.

Command:  megatransformer train --config=exits
Variants, separated by commas after the file's name and a colon:
  geometric  a loss at every iteration under a geometric prior of mean 10/3, as published
  uniform    the same under a uniform prior
  parity     running parity in place of modular arithmetic, 10 iterations
  gate       trains only an exit gate by Ouro's second stage, on the finished run of the others
  tiny       the same run in under a minute

Two layers are applied six times to expressions of up to three operations modulo 3 in prefix
notation (the task `mano`), without a prelude, a coda or injection (arXiv 2607.20519 has modulo 23
and 10 operations). Without a prior only the sixth iteration has a loss.

Expected in 3 minutes of one CPU core, one seed: exact answers of 0.904 with six iterations and
0.109 with one; 0.873 and 0.852 with `geometric`, which keeps 98% of that with 1.2 iterations by the
criterion `margin`. `parity,uniform` takes 5 minutes and keeps all answers with 7.6 iterations by
`entropy`. More in docs/results/exits.md.
What each exit criterion saves:  megatransformer calibrate --model=runs/exits_geometric
"""

from typing import Any

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("tiny", "parity", "geometric", "uniform", "gate")
EXCLUSIVE = (("geometric", "uniform"),)


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS, EXCLUSIVE)
    suffix = "".join(f"_{name}" for name in VARIANTS[:-1] if name in variants)
    config = ConfigDict(
        {
            "preset": "tiny",
            "workdir": f"runs/exits{suffix}",
            "model": {
                "vocab_size": 9,
                "max_length": 64,
                "prelude_layers": 0,
                "core_layers": 2,
                "coda_layers": 0,
                "positions": {"scheme": "learned"},
                "mlp": {"kind": "mlp", "activation": "gelu", "hidden_width": 128},
                "recurrence": {
                    "adapter": "none",
                    "state_init": "none",
                    "sampling": "fixed",
                    "mean_steps": 6,
                    "backprop_depth": 6,
                },
            },
            "data": {
                "source": "reasoning",
                "batch_size": 64,
                "sequence_length": 9,
                "reasoning": {
                    "task": "mano",
                    "modulus": 3,
                    "max_length": 3,
                    "eval_min_length": 1,
                    "eval_max_length": 3,
                    "num_eval": 1024,
                },
            },
            "optimizer": {"name": "muon", "learning_rate": 3e-3, "warmup_steps": 50},
            "train": {"steps": 1200},
            "checkpoint": {"every_steps": 600},
            "evaluation": {"every_steps": 300, "final_depths": (1, 2, 3, 4, 5, 6, 8)},
            "samples": {"every_steps": 0},
            "logging": {"every_steps": 50},
        }
    )
    if "parity" in variants:
        config.update(_PARITY)
    if "geometric" in variants and "gate" not in variants:
        config.update({"train": {"supervision": {"prior": "geometric", "prior_mean": 10 / 3}}})
    if "uniform" in variants and "gate" not in variants:
        config.update({"train": {"supervision": {"prior": "uniform"}}})
    if "tiny" in variants:
        config.update(_TINY)
    if "gate" in variants:
        config.update(_gate_only(config))
    return config


_TINY: dict[str, Any] = {
    "data": {"batch_size": 16, "reasoning": {"num_eval": 64}},
    "optimizer": {"warmup_steps": 10},
    "train": {"steps": 60},
    "checkpoint": {"every_steps": 30},
    "evaluation": {"every_steps": 30, "num_batches": 2, "final_depths": (1, 2, 6)},
    "logging": {"every_steps": 5},
}
# The model and data of experiments/configs/reasoning.py without a coda, whose states head and
# criteria read at each of 10 iterations.
_PARITY: dict[str, Any] = {
    "model": {
        "vocab_size": 4,
        "prelude_layers": 1,
        "scale_embeddings": True,
        "attention": {"window": 2},
        "positions": {"scheme": "rotary"},
        "mlp": {"kind": "gated", "activation": "silu"},
        "recurrence": {
            "adapter": "linear",
            "state_init": "normal",
            "mean_steps": 10,
            "backprop_depth": 10,
        },
    },
    "data": {
        "batch_size": 32,
        "sequence_length": 33,
        "reasoning": {
            "task": "parity",
            "modulus": 23,
            "max_length": 16,
            "eval_min_length": 17,
            "eval_max_length": 32,
            "num_eval": 512,
        },
    },
    "optimizer": {"name": "adamw", "learning_rate": 2e-3, "beta2": 0.98},
    "train": {"steps": 800},
    "checkpoint": {"every_steps": 400},
    "evaluation": {"every_steps": 400, "final_depths": (1, 2, 4, 8, 10, 16, 24, 32)},
}


def _gate_only(config: ConfigDict) -> dict[str, Any]:
    """What turns a run into one that starts from it and learns what iterations gain."""
    return {
        "workdir": f"{config.workdir}_gate",
        "model": {"exit_gate": {"enabled": True}},
        "optimizer": {"name": "adamw", "learning_rate": 5e-3, "warmup_steps": 10},
        "train": {
            "steps": min(config.train.steps, 300),
            "exit_gate": {
                "target": "gain",
                "detach": True,
                "max_steps": config.model.recurrence.mean_steps,
            },
        },
        "fine_tuning": {"init_from": config.workdir, "train_only": ("^exit_gate/",)},
    }
