"""A small Huginn: its config.json, and parameters drawn at random."""

import functools
from typing import Any

import jax

from megatransformer_jax.checkpoints.huginn import Huginn
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

HUGINN = Huginn()

# Changes that make a run's model one of Huginn's architecture.
HUGINN_RUN = {
    "model": {
        "vocab_size": 400,
        "scale_embeddings": True,
        "norm": {"placement": "sandwich"},
        "positions": {"rotary_convention": "interleaved"},
    },
    "data": {"tokenizer": {"kind": "sentencepiece"}},
}


def huginn_values(**changes: Any) -> dict[str, Any]:
    """The values of config.json."""
    return {
        "n_embd": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "padded_vocab_size": 64,
        "block_size": 128,
        "tie_embeddings": True,
        "bias": False,
        "qk_bias": True,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 1,
        "mean_recurrence": 4,
        "mean_backprop_depth": 2,
        "norm_eps": 1e-6,
        "rope_base": 50000,
        "injection_type": "linear",
        "state_init": "like-init",
        **changes,
    }


def small_huginn(**changes: Any):
    """The architecture and parameters."""
    config = HUGINN.read_config(huginn_values(**changes))
    return config, _params(config)


@functools.cache
def _params(config):
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    return jax.device_get(init_params(model, jax.random.key(0)))
