"""Growing loop counts: first 1 loop, then 2, then 4, against 4 from the start.

Command:  megatransformer train --config=curriculum
Variants, separated by commas after the file's name and a colon:
  fixed  4 loops in every step
  tiny   the same run in under a minute

Gradients flow through all loops. In the first half of the run the loops grow in two stages, 1 and
2, and so does the depth of backpropagation (`ramp_backprop`), so that these steps take less time.
The text is `pydoc_data.topics`, as of `recurrent`.

Expected in 5 minutes of one CPU core each, one seed: 4.00 nats per token at 4 loops, and 4.11 with
`fixed`, whose steps take about the same time in all (docs/results/curriculum.md).
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("tiny", "fixed")


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    is_fixed = "fixed" in variants
    # The stages save about a fifth of a run's time.
    steps = 60 if "tiny" in variants else 300 if is_fixed else 384
    config = ConfigDict(
        {
            "preset": "recurrent_mini",
            "workdir": "runs/curriculum" + "_fixed" * is_fixed,
            "model": {
                "vocab_size": 2048,
                "recurrence": {"mean_steps": 4, "backprop_depth": 4, "sampling": "fixed"},
            },
            "data": {"source": "embedded_text", "batch_size": 8, "sequence_length": 128},
            "optimizer": {"name": "muon", "learning_rate": 6e-3, "warmup_steps": steps // 10},
            "train": {"steps": steps},
            "checkpoint": {"every_steps": steps},
            "evaluation": {"every_steps": steps // 4, "final_depths": (1, 2, 4, 8, 16)},
            "samples": {"every_steps": 0},
            "logging": {"every_steps": 10},
        }
    )
    if not is_fixed:
        ramp = {"ramp": "doubling", "ramp_steps": steps // 2, "ramp_backprop": True}
        config.update({"model": {"recurrence": ramp}})
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
