"""An image autoencoder, for decoders that draw latents (`model.image.decoder.vae`).

Command:  megatransformer train --config=image_vae
Variants: `:tiny` after the file's name is the same run, far too short to learn, in a minute.

The images are scikit-learn's 1797 digits, 8 x 8 grey pixels, whose latents are 4 x 4. No network.
Expected on 2 CPU cores: about 5 minutes.
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("tiny",)


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    config = ConfigDict(
        {
            "kind": "image_vae",
            "workdir": "runs/image_vae",
            "image_vae": {
                "height": 8,
                "width": 8,
                "channels": 1,
                "model": {"base_width": 32, "latent_channels": 4},
            },
            "data": {
                "batch_size": 64,
                "validation_fraction": 0.2,
                "media": {"images": {"source": "digits"}},
            },
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50},
            "train": {"steps": 1500, "ema_decay": 0.995},
            "checkpoint": {"every_steps": 250},
            "evaluation": {"every_steps": 250},
            "samples": {"every_steps": 500},
            "logging": {"every_steps": 25},
        }
    )
    if "tiny" in variants:
        config.update(
            {
                "workdir": "runs/image_vae_tiny",
                "image_vae": {"model": {"base_width": 8}},
                "data": {"batch_size": 16},
                "optimizer": {"warmup_steps": 10},
                "train": {"steps": 40},
                "checkpoint": {"every_steps": 20},
                "evaluation": {"every_steps": 20, "num_batches": 1},
                "samples": {"every_steps": 20},
                "logging": {"every_steps": 5},
            }
        )
    return config
