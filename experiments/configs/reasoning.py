"""Running parity: a task on which more depth provably helps.

Command:  megatransformer train --config=reasoning
Variants, separated by commas after the file's name and a colon:
  diagonal  the stable diagonal injection instead of the linear adapter
  stable    Jacobian regularisation, so that iterations beyond the trained depth do not part
  gate      trains only an exit gate, on the finished run of the other variants; minutes
  tiny      the same run in under a minute

The model is trained on up to 16 bits and judged on 17 to 32: under each bit it must write the
parity of the bits so far, and one wrong bit makes an answer wrong. A layer sees one position back
(attention window 2), so what happened earlier arrives only by iterating: with 2 core layers, depth
16 reaches 34 positions. Random depth, a random first state and the input injected in every
iteration make the answer a fixed point, which iterating further does not leave.

Expected on 2 CPU cores, per variant: under 12 minutes. Exact-answer accuracy measured at depths
1, 8, 16 (the trained mean), 32, 64: linear 0.00, 0.18, 1.00, 1.00, 1.00; diagonal 0.00, 0.17, 1.00,
1.00, 1.00.
To draw both in one picture:  megatransformer compare runs/reasoning runs/reasoning_diagonal
Depths up to 8 times the trained one:  python -m benchmarks.stability runs/reasoning
The gate against hand-set thresholds:
  python -m benchmarks.reasoning_depth --workdir=runs/reasoning_gate --sections frontier
"""

from typing import Any

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("tiny", "diagonal", "stable", "gate")


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    suffix = "".join(f"_{name}" for name in VARIANTS[:-1] if name in variants)
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
    if "stable" in variants:
        jacobian = {"jacobian_weight": 0.1, "jacobian_warmup_steps": config.train.steps // 5}
        config.update({"train": {"stability": jacobian}})
    if "gate" in variants:
        config.update(_gate_only(config))
    return config


def _gate_only(config: ConfigDict) -> dict[str, Any]:
    """What turns a run into one that starts from it and learns when to stop."""
    # A geometric prior, because waiting costs no loss: once an answer is there, it stays.
    prior = {"prior": "geometric", "prior_mean": 4.0, "kl_weight": 0.01}
    return {
        "workdir": f"{config.workdir}_gate",
        "model": {"exit_gate": {"enabled": True}},
        "optimizer": {"learning_rate": 5e-3, "warmup_steps": 10},
        "train": {"steps": min(config.train.steps, 300), "exit_gate": {"detach": True, **prior}},
        "fine_tuning": {"init_from": config.workdir, "train_only": ("^exit_gate/",)},
    }
