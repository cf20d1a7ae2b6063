"""Running parity: a task on which more depth provably helps.

Command:  python -m experiments.train --config=experiments/configs/reasoning.py
Variants, separated by commas after the file's name and a colon:
  diagonal  the stable diagonal injection instead of the linear adapter
  tiny      the same run in under a minute

The model is trained on up to 16 bits and judged on 17 to 32: under each bit it must write the
parity of the bits so far, and one wrong bit makes an answer wrong. A layer sees one position back
(attention window 2), so what happened earlier arrives only by iterating: with 2 core layers, depth
16 reaches 34 positions. Random depth, a random first state and the input injected in every
iteration make the answer a fixed point, which iterating further does not leave.

Expected on 2 CPU cores, per variant: under 12 minutes. Exact-answer accuracy measured at depths
1, 8, 16 (the trained mean), 32, 64: linear 0.00, 0.09, 0.89, 1.00, 1.00; diagonal 0.00, 0.16, 1.00,
1.00, 1.00.
To draw both in one picture:  python -m experiments.compare runs/reasoning runs/reasoning_diagonal
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
                "vocab_size": 4,
                "max_length": 64,
                "core_layers": 2,
                "scale_embeddings": True,
                "attention": {"window": 2},
                "mlp": {"hidden_width": 128},
                "recurrence": {
                    "adapter": "diagonal" if "diagonal" in variants else "linear",
                    "state_init": "normal",
                    "mean_steps": 16,
                    "backprop_depth": 8,
                },
            },
            "data": {
                "source": "reasoning",
                "batch_size": 64,
                "sequence_length": 33,
                "reasoning": {
                    "task": "parity",
                    "max_length": 16,
                    "eval_min_length": 17,
                    "eval_max_length": 32,
                },
            },
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50, "beta2": 0.98},
            "train": {"steps": 1000},
            "checkpoint": {"every_steps": 250},
            "evaluation": {"every_steps": 250, "final_depths": (1, 2, 4, 8, 16, 32, 64)},
            "samples": {"every_steps": 250},
            "logging": {"every_steps": 25},
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
                "samples": {"every_steps": 30},
                "logging": {"every_steps": 5},
            }
        )
    return config
