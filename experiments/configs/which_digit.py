"""A model that sees three handwritten digits and says which of them is, for example, the seven.

Command:  megatransformer train --config=which_digit
Variants: `:tiny` after the file's name is the same run, far too short to learn; most of its time
goes into compiling.

Three of four rows hold three of scikit-learn's digits in random order, numbered, then a question
and its answer: `1` image `2` image `3` image `Which is seven?` `2`. No loss is computed on the
question. The others are single images with their names, from which digits are learned first. The
answers start to be better than chance (33%) after about half of the steps. No network.

Expected: 96.7% of the questions about the 359 held-out digits right at depth 4, the trained mean
(one seed). 13 minutes on 2 CPU cores shared with about ten other jobs.
By depth:  megatransformer evaluate --model=runs/which_digit
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import experiment_config, parse_variants

VARIANTS = ("tiny",)


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    config = experiment_config("image", arg)
    config.update(
        {
            "workdir": "runs/which_digit_tiny" if "tiny" in variants else "runs/which_digit",
            "model": {
                "max_length": 64,
                # Nothing is drawn, so the decoder is as small as it can be.
                "image": {"patch_size": 4, "decoder": {"unet": {"base_width": 16}}},
            },
            "data": {
                "sequence_length": 26,
                "media": {"tasks": ("which=3", "caption=1"), "images_per_row": 3},
            },
            "checkpoint": {"best_metric": "validation/which_accuracy"},
        }
    )
    if "tiny" not in variants:
        config.update({"train": {"steps": 1500}})
    return config
