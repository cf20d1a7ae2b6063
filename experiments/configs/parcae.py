"""Parcae's recipe against Huginn's and against no loop at all, at equal parameters and data.

Command:  megatransformer train --config=parcae
Variants, separated by commas after the file's name and a colon:
  huginn  Huginn's model: linear injection, sandwich norms, depths drawn per batch from a log-normal
          Poisson distribution; wider feed-forward layers have the parameters of the value
          embeddings that it lacks
  plain   the same layers, each passed through once
  adamw   Huginn's optimiser in place of Parcae's: AdamW with warm-up and cosine decay
  short   fewer steps of half the tokens, for the table of learning rates
  tiny    the same run in under a minute

So `huginn,adamw` is Huginn's recipe. The default is the preset `parcae_mini`: diagonal injection of
the normalised prelude, a depth per sequence from a truncated Poisson distribution, a read-out
matrix, value embeddings, outputs that start at zero; Muon without warm-up, with half of the run to
cool down. The text is `pydoc_data.topics`, as of `recurrent`.

Expected: a validation loss by depth in the log. With `short`, at their best learning rates,
Parcae's recipe reaches 4.72 nats and Huginn's 5.23 (docs/results/parcae.md). The default takes
6 minutes and ends at 4.15 nats; `huginn,adamw` and `plain` were not run to the end.
"""

from typing import Any

from ml_collections import ConfigDict

from megatransformer_jax.config.build import load_preset, parse_variants, to_dict
from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig

VARIANTS = ("tiny", "huginn", "plain", "adamw", "short")


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    suffix = "".join(f"_{name}" for name in VARIANTS[1:] if name in variants)
    is_huginn = "huginn" in variants
    steps = 60 if "tiny" in variants else 120 if "short" in variants else 300
    optimizer = _adamw(steps) if "adamw" in variants else load_preset("parcae_mini")["optimizer"]
    config = ConfigDict(
        {
            "preset": "recurrent_mini" if is_huginn else "parcae_mini",
            "workdir": f"runs/parcae{suffix}",
            "model": {"vocab_size": 2048},
            "data": {
                "source": "embedded_text",
                "batch_size": 8,
                "sequence_length": 64 if "short" in variants else 128,
            },
            "optimizer": optimizer,
            "train": {"steps": steps},
            "checkpoint": {"every_steps": steps},
            "evaluation": {"every_steps": steps // 2, "final_depths": (1, 2, 4, 8, 16, 32)},
            "samples": {"every_steps": 0},
            "logging": {"every_steps": 10},
        }
    )
    if is_huginn:
        config.update({"model": {"mlp": {"hidden_width": 682}}})
    if "plain" in variants:
        # The injection's parameters go to the feed-forward layers.
        config.model.update({"mlp": {"hidden_width": 703 if is_huginn else 544}})
        config.update(
            {
                "model": {
                    "prelude_layers": 4,
                    "core_layers": 0,
                    "coda_layers": 0,
                    "recurrence": to_dict(RecurrenceConfig()),
                },
                "evaluation": {"final_depths": (1,)},
            }
        )
    if "tiny" in variants:
        config.update(
            {
                "workdir": f"{config.workdir}_tiny",
                "model": {"vocab_size": 512, "width": 32, "mlp": {"hidden_width": 64}},
                "data": {"sequence_length": 64},
                "evaluation": {"num_batches": 2},
            }
        )
    return config


def _adamw(steps: int) -> dict[str, Any]:
    """Huginn's kind of optimiser, with the defaults of all that only Muon reads."""
    return to_dict(OptimizerConfig(learning_rate=2e-3, warmup_steps=steps // 10))
