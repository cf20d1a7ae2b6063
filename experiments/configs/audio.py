"""A model that speaks digits from their names, and writes down those that it hears.

Command:  megatransformer train --config=audio
Variants: `:tiny` after the file's name is the same run, far too short to learn; most of its few
minutes go into compiling.

The clips are words spoken by espeak-ng if it is installed, else tones with captions. No network.
Expected on 2 CPU cores: about 20 minutes; nearly all transcripts of held-out clips are right, and a
classifier trained on real clips recognises nearly all digits that are spoken
(`megatransformer evaluate --model=runs/audio`).
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("tiny",)


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    config = ConfigDict(
        {
            "workdir": "runs/audio",
            "model": {
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
                "audio": {
                    "enabled": True,
                    "max_frames": 64,
                    "downsampling": 4,
                    "prelude_layers": 2,
                    "coda_layers": 1,
                    "context_length": 24,
                    "decoder": {
                        "width": 96,
                        "dilations": (1, 2, 4),
                        "sampler": {"num_steps": 25, "guidance_scale": 2.0},
                    },
                },
            },
            "data": {
                "source": "media",
                "batch_size": 64,
                "sequence_length": 24,
                "validation_fraction": 0.2,
                "tokenizer": {"kind": "bytes"},
                "media": {"tasks": ("speak=1", "transcribe=1")},
            },
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50},
            "train": {"steps": 1500, "ema_decay": 0.995},
            "checkpoint": {"every_steps": 250},
            "evaluation": {"every_steps": 250, "final_depths": (1, 2, 4, 8)},
            "samples": {"every_steps": 500},
            "logging": {"every_steps": 25},
        }
    )
    if "tiny" in variants:
        config.update(
            {
                "workdir": "runs/audio_tiny",
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
