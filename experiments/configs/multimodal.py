"""One model of text, images and sound: it draws, captions, speaks, transcribes and writes.

Command:  megatransformer train --config=multimodal
Variants: `:tiny` after the file's name is the same run, far too short to learn; most of its few
minutes go into compiling.

The parts for images and for sound are those of image.py and audio.py, and so is the data: digits to
see and digits to hear, and a little English text. No network.
Expected on 2 CPU cores: 25 to 45 minutes, and results within a few points of those of the two.
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import experiment_config, parse_variants

VARIANTS = ("tiny",)


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    config = experiment_config("image", arg)
    sound = experiment_config("audio", arg)
    config.update(
        {
            "workdir": "runs/multimodal_tiny" if "tiny" in variants else "runs/multimodal",
            "model": {"max_length": 128, "audio": sound.model.audio},
            "data": {
                "sequence_length": 48,
                # Captions and transcripts take longer to learn than drawing and speaking do.
                "media": {
                    "tasks": ("draw=1", "caption=2", "speak=1", "transcribe=2", "text=1"),
                },
            },
        }
    )
    if "tiny" not in variants:
        config.update({"train": {"steps": 2400}})
    return config
