"""Puzzles on a grid: a model that looks at all cells in every iteration, as a solver does.

Command:  megatransformer train --config=puzzles
Variants, separated by commas after the file's name and a colon:
  maze   the way through 9 x 9 cells; otherwise sudoku of 6 x 6 cells
  tiny   the same run in under a minute

Trained on sudokus with 1 to 20 blank cells and judged on 21 to 24, or on ways past 1 to 8 rooms and
judged on 9 to 16. Every cell sees every other one in each of two layers, which are iterated 8 times
on average from a random first state. So more iterations than in training, and votes of several
first states, can be tried on the finished run:
  megatransformer evaluate --model=runs/puzzles --depths=8,16,32,64 --votes=8

Expected for sudoku, one seed, in 21 minutes of one CPU core: 0.904 of the puzzles solved with 8
iterations and 0.969 with 32 (docs/results/puzzles.md). Mazes were not run to the end.
"""

from typing import Any

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("tiny", "maze")


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    puzzle = _maze() if "maze" in variants else _sudoku()
    config = ConfigDict(
        {
            "preset": "tiny",
            "model": {
                "width": 64,
                "prelude_layers": 0,
                "core_layers": 2,
                "coda_layers": 0,
                # Places count as much as symbols, and their sum is injected at size 1.
                "scale_embeddings": False,
                "positions": {"scheme": "learned"},
                # Every cell sees every other one.
                "attention": {"is_causal": False, "num_heads": 4},
                "mlp": {"hidden_width": 176},
                "recurrence": {
                    "injection_norm": True,
                    "state_init": "normal",
                    "mean_steps": 8,
                    "backprop_depth": 4,
                },
            },
            "data": {"source": "reasoning", "batch_size": 64},
            "optimizer": {"name": "muon", "learning_rate": 3e-3, "warmup_steps": 50, "beta2": 0.98},
            "evaluation": {"final_depths": (1, 2, 4, 8, 16, 32, 64)},
            "logging": {"every_steps": 25},
        }
    )
    config.update(puzzle)
    config.workdir = "runs/puzzles" + "".join(f"_{name}" for name in VARIANTS if name in variants)
    for section in ("checkpoint", "evaluation", "samples"):
        config.update({section: {"every_steps": config.train.steps // 4}})
    if "tiny" in variants:
        config.update(_tiny())
    return config


def _sudoku() -> dict[str, Any]:
    return {
        "model": {"vocab_size": 9, "max_length": 37},
        "data": {
            "sequence_length": 37,
            "reasoning": {
                "task": "sudoku",
                "min_length": 1,
                "max_length": 20,
                "eval_min_length": 21,
                "eval_max_length": 24,
            },
        },
        "train": {"steps": 2000},
    }


def _maze() -> dict[str, Any]:
    return {
        "model": {"vocab_size": 7, "max_length": 82},
        "data": {
            "sequence_length": 82,
            "reasoning": {
                "task": "maze",
                "min_length": 1,
                "max_length": 8,
                "eval_min_length": 9,
                "eval_max_length": 16,
            },
        },
        "train": {"steps": 2000},
    }


def _tiny() -> dict[str, Any]:
    return {
        "model": {"width": 32, "mlp": {"hidden_width": 64}},
        "data": {"batch_size": 8, "reasoning": {"num_eval": 16}},
        "optimizer": {"warmup_steps": 5},
        "train": {"steps": 20},
        "checkpoint": {"every_steps": 10},
        "evaluation": {"every_steps": 10, "num_batches": 2, "final_depths": (1, 2, 4, 8)},
        "samples": {"every_steps": 10},
        "logging": {"every_steps": 5},
    }
