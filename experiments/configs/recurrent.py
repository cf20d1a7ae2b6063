"""A depth-recurrent language model on English text that ships with Python.

Command:  megatransformer train --config=recurrent
Variants: `:tiny` after the file's name is the same run in under a minute.

The text is `pydoc_data.topics`; the run trains its own SentencePiece tokenizer on it. No network.
Expected on 2 CPU cores: about 10 minutes, readable samples, and a validation loss of about 3.6 that
falls from depth 1 (3.69 measured) to the trained mean of 8 (3.57) and then stays.
"""

from ml_collections import ConfigDict

from megatransformer_jax.config.build import parse_variants

VARIANTS = ("tiny",)


def get_config(arg: str = "") -> ConfigDict:
    variants = parse_variants(arg, VARIANTS)
    config = ConfigDict(
        {
            "preset": "recurrent_small_sandwich",
            "workdir": "runs/recurrent",
            "model": {"vocab_size": 2048},
            "data": {
                "source": "embedded_text",
                "batch_size": 8,
                "sequence_length": 128,
            },
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50},
            "train": {"steps": 700},
            "checkpoint": {"every_steps": 100},
            "evaluation": {"every_steps": 100, "final_depths": (1, 2, 4, 8, 16, 32)},
            "samples": {"every_steps": 200},
            "logging": {"every_steps": 10},
        }
    )
    if "tiny" in variants:
        config.update(
            {
                "preset": "tiny",
                "workdir": "runs/recurrent_tiny",
                "model": {"vocab_size": 512},
                "data": {"sequence_length": 64},
                "optimizer": {"warmup_steps": 10},
                "train": {"steps": 60},
                "checkpoint": {"every_steps": 30},
                "evaluation": {"every_steps": 30, "num_batches": 2, "final_depths": (1, 2, 4, 8)},
                "samples": {"every_steps": 30, "max_new_tokens": 16},
            }
        )
    return config
