"""A tiny model as `load` gives it, and its programs written into a folder.

The tests of exported programs share them.
"""

import functools
import pathlib
import tempfile

from tiny_model import DEPTH, make, tiny

from megatransformer_jax.config.exporting import ProgramConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.export.folder import export_program
from megatransformer_jax.runs.load import LoadedModel

# Grouped heads, a window, first states that are drawn: each has operations of its own.
CONFIG = tiny(
    vocab_size=259,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=24),
    recurrence={"state_init": "like_init"},
)
OPTIONS = {"batch": 2, "capacity": 64, "chunk": 8, "cache_slots": 8}
CRITERIA = {"stablehlo": ("latent_diff",), "onnx": ("latent_diff", "kl")}


def loaded(config=CONFIG):
    model, params = make(config)
    depth = DEPTH if config.is_recurrent else None
    return LoadedModel(config, model, params, BytesTokenizer(), depth, "tiny")


def program_config(format):
    return ProgramConfig(format=format, criterion=CRITERIA[format], **OPTIONS)


@functools.cache
def written(format):
    """A folder with the programs of CONFIG; nobody may change it."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="exported_")) / format
    export_program(loaded(), folder, program_config(format))
    return folder
