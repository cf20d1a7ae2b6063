"""A model that draws handwritten digits from their names, and names them.

Command:  megatransformer train --config=image
Variants: `:tiny` after the file's name is the same run, far too short to learn; most of its few
minutes go into compiling.

The images are scikit-learn's 1797 digits, 8 x 8 grey pixels. No network.
Expected on 2 CPU cores: 10 to 20 minutes; a classifier trained on real digits recognises all but a
few of the drawn ones, and about 98% of the captions of held-out digits are right
(`megatransformer evaluate --model=runs/image`).
"""

from typing import Any

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("tiny",)


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    config = ConfigDict(
        {
            "workdir": "runs/image",
            "model": _model(),
            "data": {
                "source": "media",
                "batch_size": 64,
                "sequence_length": 24,
                "validation_fraction": 0.2,
                "tokenizer": {"kind": "bytes"},
                "media": {
                    # Captions take longer to learn than drawing does.
                    "tasks": ("draw=1", "caption=2"),
                    "images": {
                        "augmentation": {
                            "max_shift": 0.125,
                            "max_rotation_deg": 10.0,
                            "max_zoom": 0.1,
                        }
                    },
                },
            },
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50},
            "train": {"steps": 2000, "ema_decay": 0.995},
            "checkpoint": {"every_steps": 250},
            "evaluation": {"every_steps": 250, "final_depths": (1, 2, 4, 8)},
            "samples": {"every_steps": 500},
            "logging": {"every_steps": 25},
        }
    )
    if "tiny" in variants:
        config.update(
            {
                "workdir": "runs/image_tiny",
                "model": {"width": 32, "mlp": {"hidden_width": 64}},
                "data": {"batch_size": 16},
                "optimizer": {"warmup_steps": 10},
                "train": {"steps": 40},
                "checkpoint": {"every_steps": 20},
                "evaluation": {"every_steps": 20, "num_batches": 2, "final_depths": (1, 4)},
                "samples": {"every_steps": 20},
                "logging": {"every_steps": 5},
            }
        )
    return config


def _model() -> dict[str, Any]:
    return {
        # Bytes, three special tokens and six around media.
        "vocab_size": 272,
        "width": 64,
        "max_length": 64,
        "prelude_layers": 1,
        "core_layers": 1,
        "coda_layers": 1,
        "attention": {"num_heads": 4},
        "mlp": {"hidden_width": 176},
        "recurrence": {"mean_steps": 4, "backprop_depth": 4, "state_init": "zero"},
        "image": {
            "enabled": True,
            "height": 8,
            "width": 8,
            "channels": 1,
            "patch_size": 2,
            "prelude_layers": 2,
            "coda_layers": 1,
            # All of the longest caption.
            "context_length": 24,
            "decoder": {
                "unet": {"base_width": 32},
                "sampler": {"num_steps": 25, "guidance_scale": 2.0},
            },
        },
    }
