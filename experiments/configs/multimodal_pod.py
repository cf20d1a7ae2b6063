"""multimodal_large, 2.7 billion parameters of text, images and sound, on a TPU slice: v4-32.

Command:  megatransformer train --config=multimodal_pod
Variants: none.

Give your samples with --config.data.media and a workdir that all hosts share with --config.workdir,
and start it with --config.distributed.enabled=true on all hosts. Without data it draws, captions,
speaks and transcribes digits. What the slice will hold and do can be seen without one, on a machine
with more than 24 GiB of memory:

  megatransformer compile --config=multimodal_pod --topology=v4-32

Expected, as `megatransformer inspect --device=v4` predicts: 14.4 of 30.75 GiB on a chip; splash
attention, as text and places of media are 1792 together. The step has not run; compiling it ran out
of memory on a machine with 24 GiB.
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ()


def get_config(arg: str = "") -> ConfigDict:
    parse_variants(arg, VARIANTS)
    return ConfigDict(
        {
            "preset": "multimodal_large",  # With model.remat="full".
            "workdir": "runs/multimodal_v4_32",
            "data": {
                "source": "media",
                "batch_size": 16,
                "sequence_length": 1024,
                "tokenizer": {"kind": "bytes"},  # Or your own, as model_file.
                "media": {"tasks": ("draw=1", "caption=1", "speak=1", "transcribe=1", "text=1")},
            },
            "mesh": {"data": 1, "fsdp": 16},
            "optimizer": {"learning_rate": 3e-4, "warmup_steps": 2000},
            "train": {"steps": 50_000, "precision": "bfloat16"},
            "checkpoint": {"every_steps": 1000},
            "evaluation": {"every_steps": 5000, "num_batches": 8},
        }
    )
