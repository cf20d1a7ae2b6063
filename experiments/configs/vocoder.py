"""A vocoder: from mel spectrograms of speech to waveforms.

Command:  megatransformer train --config=vocoder
Variants, separated by commas after the file's name and a colon:
  gan   also trains discriminators, and the generator against them; slower
  tiny  the same run, far too short to learn, in under a minute

The speech is espeak-ng's (Debian: apt-get install espeak-ng): sentences of `pydoc_data.topics` in
several voices at 16 kHz. Without it: --config.data.media.audio.source=tones.
The comparison with Griffin-Lim on held-out sentences:
  python -m benchmarks.vocoder_quality --workdir=runs/vocoder
Expected on 2 CPU cores: about 15 minutes.
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("tiny", "gan")


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    suffix = "".join(f"_{name}" for name in VARIANTS if name in variants)
    config = ConfigDict(
        {
            "kind": "vocoder",
            "workdir": f"runs/vocoder{suffix}",
            "vocoder": {
                "width": 192,
                "segment_frames": 32,
                "istft": {"num_blocks": 5, "griffin_lim_steps": 24},
            },
            "data": {
                "batch_size": 16,
                "media": {"audio": {"source": "speech", "cache_dir": "runs/vocoder_speech"}},
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 100, "clip_norm": 10.0},
            "train": {"steps": 3000, "ema_decay": 0.999},
            "checkpoint": {"every_steps": 500},
            "evaluation": {"every_steps": 500, "num_batches": 4},
            "samples": {"every_steps": 1000},
            "logging": {"every_steps": 50},
        }
    )
    if "gan" in variants:
        discriminator = {"enabled": True, "periods": (2, 3, 5), "num_scales": 2, "width": 8}
        config.update(
            {
                "vocoder": {"discriminator": discriminator},
                "optimizer": {"beta1": 0.8, "beta2": 0.99},
                "train": {"steps": 1500},
            }
        )
    if "tiny" in variants:
        config.update(
            {
                "vocoder": {"width": 32, "segment_frames": 16, "istft": {"num_blocks": 2}},
                "data": {"batch_size": 8},
                "optimizer": {"warmup_steps": 10},
                "train": {"steps": 40},
                "checkpoint": {"every_steps": 20},
                "evaluation": {"every_steps": 20, "num_batches": 1},
                "samples": {"every_steps": 20},
                "logging": {"every_steps": 10},
            }
        )
    return config
