"""Rise then collapse: a core trained at one depth loses its answers when it is iterated further.

Command:  megatransformer train --config=collapse
Variants, separated by commas after the file's name and a colon. Alone they are cures for the base:
  linear        the input is injected in every iteration, by the linear adapter
  diagonal      the same by the stable diagonal adapter
  random        the number of loops is drawn for each step, 1 to 7 with mean 4, instead of always 4
  sandwich      norms outside of the residual, norm(x + f(norm(x))), which bound the state
  jacobian      Jacobian regularisation, after STARS
  fixed_point   the last iteration is penalised for what it still changes
  random_state  the first state is random; the input is then injected (linear, unless diagonal)
  language      English text in place of addition, with prelude, coda and two core layers
  tiny          the same run in under a minute

One layer, applied 4 times to the embedding, learns to add numbers of 2 digits. There is no
prelude, no coda and, in the base, no injection: the set-up of STARS (arXiv 2605.26733), smaller.
The run ends with exact-answer accuracy at 1 to 32 loops.

Expected on one CPU core: 2 minutes per run of addition, 5 to 10 with `language`. Exact-answer
accuracy measured at 4, 8 and 32 loops: base 1.00, 0.00, 0.00; fixed_point 1.00, 1.00, 0.01; random
0.95, 0.90, 0.22; diagonal,fixed_point 1.00, 1.00, 0.94; with random or jacobian too 1.00, 1.00,
1.00. Loss of language at 4, 8, 32 and 64: 4.31, 4.43, 5.24, 5.75; with random 4.45, 4.51, 4.86,
5.15. All: docs/results/collapse.md
"""

from typing import Any

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = (
    "linear",
    "diagonal",
    "random",
    "sandwich",
    "jacobian",
    "fixed_point",
    "random_state",
    "language",
    "tiny",
)
EXCLUSIVE = (("linear", "diagonal"),)


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS, EXCLUSIVE)
    is_language = "language" in variants
    config = ConfigDict(
        {
            "workdir": "runs/collapse" + "".join(f"_{v}" for v in VARIANTS if v in variants),
            "model": {"scale_embeddings": True, "attention": {"num_heads": 4}},
            "optimizer": {"name": "muon", "learning_rate": 6e-3, "warmup_steps": 50},
            "checkpoint": {"every_steps": 300},
            "evaluation": {
                "every_steps": 300,
                "final_depths": (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, *([64] if is_language else [])),
            },
            "samples": {"every_steps": 0},
            "logging": {"every_steps": 25},
        }
    )
    config.update(_language() if is_language else _addition())
    if "tiny" in variants:
        config.update(_tiny())
    config.update(_cures(variants, config.train.steps))
    return config


def _addition() -> dict[str, Any]:
    lengths = ("min_length", "max_length", "eval_min_length", "eval_max_length")
    return {
        "model": {
            "vocab_size": 15,
            "width": 64,
            "max_length": 16,
            "prelude_layers": 0,
            "core_layers": 1,
            "coda_layers": 0,
            "norm": {"kind": "layernorm"},
            "mlp": {"kind": "mlp", "activation": "gelu", "hidden_width": 192},
        },
        "data": {
            "source": "reasoning",
            "batch_size": 64,
            "sequence_length": 10,
            "reasoning": {"task": "addition", **dict.fromkeys(lengths, 2)},
        },
        "train": {"steps": 600},
    }


def _language() -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": 2048,
            "width": 128,
            "prelude_layers": 1,
            "core_layers": 2,
            "coda_layers": 1,
            "mlp": {"hidden_width": 352},
        },
        "data": {"source": "embedded_text", "batch_size": 8, "sequence_length": 128},
        "train": {"steps": 250},
    }


def _cures(variants: set[str], steps: int) -> dict[str, Any]:
    recurrence: dict[str, Any] = {
        "adapter": "none",
        "state_init": "none",
        "sampling": "fixed",
        "mean_steps": 4,
        "backprop_depth": 4,
        "output_norm": False,
    }
    stability: dict[str, Any] = {}
    model: dict[str, Any] = {"recurrence": recurrence}
    if variants & {"linear", "diagonal", "random_state"}:
        recurrence["adapter"] = "diagonal" if "diagonal" in variants else "linear"
    if "random_state" in variants:
        recurrence["state_init"] = "normal"
    if "random" in variants:
        recurrence["sampling"] = "uniform"
    if "sandwich" in variants:
        model["norm"] = {"placement": "sandwich"}
    if "jacobian" in variants:
        stability |= {"jacobian_weight": 0.1, "jacobian_warmup_steps": steps // 5}
    if "fixed_point" in variants:
        stability |= {"fixed_point_weight": 1.0, "fixed_point_warmup_steps": steps // 5}
    return {"model": model, "train": {"stability": stability}}


def _tiny() -> dict[str, Any]:
    return {
        "model": {"width": 32, "mlp": {"hidden_width": 64}},
        "data": {"batch_size": 16},
        "optimizer": {"warmup_steps": 10},
        "train": {"steps": 60},
        "checkpoint": {"every_steps": 30},
        "evaluation": {"every_steps": 30, "num_batches": 2, "final_depths": (1, 2, 4, 8)},
        "logging": {"every_steps": 5},
    }
