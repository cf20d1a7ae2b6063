"""recurrent_medium (94 million parameters) on a TPU slice: v4-8, or v5e-16.

Command:  megatransformer train --config=recurrent_pod
Variants: `:v5e_16` after the file's name is the same run, with the same batch, on 16 chips of v5e.

Give your text with --config.data.files and a workdir that all hosts share with --config.workdir. On
several hosts add --config.distributed.enabled=true, on all of them. What the slice will hold and do
can be seen without one:

  megatransformer compile --config=recurrent_pod --topology=v4-8
  megatransformer compile --config=recurrent_pod:v5e_16 --topology=v5e-16

Expected, compiled with libtpu 0.0.42.1 and not run: the step needs 15.0 of 30.75 GiB on a chip of
v4 and 8.9 of 15.75 GiB on one of v5e, with splash attention in every stack and one sum of gradients
per step. Estimates without overlap: 0.39 s per step, 339,000 tokens per second, MFU 46% (v4);
0.12 s, 1,060,000, 50% (v5e).
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("v5e_16",)


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    config = ConfigDict(
        {
            "preset": "recurrent_medium",
            "workdir": "runs/recurrent_v4_8",
            "data": {
                "source": "arrayrecord",
                "files": ("data/train-*.arrayrecord",),
                "batch_size": 64,
                "sequence_length": 2048,
            },
            "mesh": {"data": 4},
            "optimizer": {"learning_rate": 6e-4, "warmup_steps": 1000},
            # Four rows on a device at a time, without rematerialisation.
            "train": {"steps": 50_000, "accumulation": 4, "precision": "bfloat16"},
            "checkpoint": {"every_steps": 1000},
            "evaluation": {"every_steps": 1000, "num_batches": 16},
        }
    )
    if "v5e_16" in variants:
        config.update(
            {
                "workdir": "runs/recurrent_v5e_16",
                "mesh": {"data": 16},
                "train": {"accumulation": 2},
            }
        )
    return config
