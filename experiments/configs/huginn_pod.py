"""Huginn, 3.5 billion parameters, from scratch on a TPU pod: v4-128, v5e-256, or two slices.

Command:  megatransformer train --config=huginn_pod
Variants: `:v5e_256` is for 256 chips of v5e, `:two_slices` for two slices that the data centre's
          network joins, with twice the batch; `:v5e_256,two_slices` is both.

Give your text with --config.data.files and a workdir that all hosts share with --config.workdir,
and start it with --config.distributed.enabled=true on all hosts of all slices. What a slice will
hold and do can be seen without one, in 10 to 18 minutes of a core:

  megatransformer compile --config=huginn_pod --topology=v4-128
  megatransformer compile --config=huginn_pod:two_slices --topology=v4-128 --slices=2

Expected, compiled with libtpu 0.0.42.1 and not run: the step needs 19.1 of 30.75 GiB on a chip of
v4 and 15.2 of 15.75 GiB on one of v5e, with splash attention in every stack, and sends 16 GiB.
Estimates without overlap: 3.55 s per step, 73,900 tokens per second, MFU 73% (v4); 4.93 s, 212,000,
74% (v5e). On two slices each chip holds as much; that step was not compiled. Decoding one text at
depth 32 takes 11.2 GiB on a chip of v5e (docs/pods.md).
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("v5e_256", "two_slices")


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    name, mesh, batch_size = "v4_128", {"data": 4, "fsdp": 16}, 64
    if "v5e_256" in variants:
        name, mesh, batch_size = "v5e_256", {"data": 8, "fsdp": 32}, 256
    if "two_slices" in variants:
        name, mesh["data"], batch_size = f"two_{name}", 2 * mesh["data"], 2 * batch_size
    return ConfigDict(
        {
            "preset": "huginn_3_5b",  # With model.remat="full".
            "workdir": f"runs/huginn_{name}",
            "data": {
                "source": "arrayrecord",
                "files": ("data/train-*.arrayrecord",),
                "batch_size": batch_size,
                "sequence_length": 4096,
            },
            "mesh": mesh,
            "optimizer": {"learning_rate": 4e-4, "warmup_steps": 4000},
            "train": {"steps": 100_000, "precision": "bfloat16"},
            "checkpoint": {"every_steps": 1000},
            "evaluation": {"every_steps": 5000, "num_batches": 8},
        }
    )
