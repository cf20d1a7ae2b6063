"""The format of GPT-2: config.json and tensors of transformers.

Source: transformers 5, `models/gpt2`. Its linear layers are stored as [inputs, outputs].
"""

import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatransformer_jax.checkpoints.foreign import (
    Format,
    Kind,
    check_fixed,
    checked_values,
    is_of_model_type,
    plain_comparable,
    plain_layers,
    tied_head,
)
from megatransformer_jax.checkpoints.llama import (
    ACTIVATIONS,
    TIED_HEAD,
    activation_name,
    check_activation,
)
from megatransformer_jax.checkpoints.tensor_map import (
    Check,
    FormatError,
    Link,
    fused_qkv,
    reshaped,
    same,
)
from megatransformer_jax.config.layers import AttentionConfig, PositionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.config.option import ConfigError

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"

_EMBEDDING = "transformer.wte.weight"
_HEAD = "lm_head.weight"
_DEFAULT_ACTIVATION = "gelu_new"
_REQUIRED: dict[str, Kind] = {
    "vocab_size": int,
    "n_positions": int,
    "n_embd": int,
    "n_layer": int,
    "n_head": int,
}
_DEFAULTS: dict[str, tuple[Kind, Any]] = {
    "n_inner": ((int, types.NoneType), None),
    "activation_function": (str, _DEFAULT_ACTIVATION),
    "layer_norm_epsilon": (float, 1e-5),
    "tie_word_embeddings": (bool, True),
    "embd_pdrop": (float, 0.1),
    "resid_pdrop": (float, 0.1),
    "attn_pdrop": (float, 0.1),
}
# What this package computes. (reorder_and_upcast_attn changes rounding only.)
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
_NORMS = {"attention_norm_in": "ln_1", "mlp_norm_in": "ln_2"}


class Gpt2(Format):
    """Folders of GPT2LMHeadModel."""

    name = "gpt2"
    title = "GPT-2"
    base_prefix = "transformer."

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """See `Format.recognises`."""
        return is_of_model_type(values, (MODEL_TYPE,), (ARCHITECTURE,))

    def read_config(self, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """See `Format.read_config`."""
        check_fixed(values, _FIXED, where, f"only models like {ARCHITECTURE}'s are supported")
        known = checked_values(values, _REQUIRED, _DEFAULTS, where)
        check_activation("activation_function", known, where)
        try:
            return _build(known)
        except ConfigError as error:
            raise FormatError(f"{where}: these values make no model: {error}") from error

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """See `Format.write_config`."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": MODEL_TYPE,
            "vocab_size": config.vocab_size,
            "n_positions": config.max_length,
            "n_ctx": config.max_length,
            "n_embd": config.width,
            "n_layer": config.prelude_layers,
            "n_head": config.attention.num_heads,
            "n_inner": config.mlp.hidden_width,
            "activation_function": activation_name(config.mlp.activation, _DEFAULT_ACTIVATION),
            "layer_norm_epsilon": config.norm.eps,
            "tie_word_embeddings": config.tie_embeddings,
            "embd_pdrop": config.embedding_dropout_rate,
            "resid_pdrop": config.residual_dropout_rate,
            "attn_pdrop": config.attention.dropout_rate,
        }

    def comparable(self, config: ModelConfig) -> tuple[ModelConfig, list[str]]:
        """See `Format.comparable`."""
        return plain_comparable(self.title, config)

    def links(self, config: ModelConfig) -> list[Link]:
        """See `Format.links`."""
        width, vocabulary = config.width, (config.vocab_size, config.width)
        links = [
            same("embedding/embedding", _EMBEDDING, vocabulary),
            same(
                "embedding/position_embedding",
                "transformer.wpe.weight",
                (config.max_length, width),
            ),
        ]
        for number, ours in enumerate(plain_layers(config)):
            links += _layer(ours, f"transformer.h.{number}", config)
        links += _norm("final_norm", "transformer.ln_f", width)
        if not config.tie_embeddings:
            links.append(same("embedding/head", _HEAD, vocabulary))
        return links

    def extras(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Mapping[str, Check]:
        """Causal masks that early versions stored, and a head that is the embedding."""
        checks: dict[str, Check] = {}
        for layer in range(config.prelude_layers):
            checks[f"transformer.h.{layer}.attn.bias"] = _mask_complaint
            checks[f"transformer.h.{layer}.attn.masked_bias"] = lambda value: None
        if config.tie_embeddings:
            checks[_HEAD] = tied_head(tensors, _EMBEDDING, *TIED_HEAD)
        return checks


def _build(known: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=known["vocab_size"],
        width=known["n_embd"],
        max_length=known["n_positions"],
        prelude_layers=known["n_layer"],
        core_layers=0,
        coda_layers=0,
        tie_embeddings=known["tie_word_embeddings"],
        embedding_dropout_rate=float(known["embd_pdrop"]),
        residual_dropout_rate=float(known["resid_pdrop"]),
        attention=AttentionConfig(
            num_heads=known["n_head"],
            qkv_bias=True,
            output_bias=True,
            dropout_rate=float(known["attn_pdrop"]),
        ),
        positions=PositionConfig(scheme="learned"),
        norm=NormConfig(kind="layernorm", eps=known["layer_norm_epsilon"], bias=True),
        mlp=MlpConfig(
            kind="mlp",
            hidden_width=known["n_inner"] or 4 * known["n_embd"],
            activation=ACTIVATIONS[known["activation_function"]],
            bias=True,
        ),
    )


def _layer(ours: str, theirs: str, config: ModelConfig) -> list[Link]:
    width, hidden, heads = config.width, config.mlp.hidden_width, config.attention.num_heads
    head_dim = config.head_dim(width)
    attention, their_attention = f"{ours}/attention", f"{theirs}.attn"
    mlp, their_mlp = f"{ours}/mlp", f"{theirs}.mlp"
    links = [
        link for name, there in _NORMS.items()
        for link in _norm(f"{ours}/{name}", f"{theirs}.{there}", width)
    ]  # fmt: skip
    return [
        *links,
        fused_qkv(
            f"{attention}/qkv",
            f"{their_attention}.c_attn.weight",
            heads,
            heads,
            (head_dim, width),
            is_transposed=True,
        ),
        fused_qkv(
            f"{attention}/qkv_bias", f"{their_attention}.c_attn.bias", heads, heads, (head_dim,)
        ),
        reshaped(
            f"{attention}/output",
            f"{their_attention}.c_proj.weight",
            (heads * head_dim, width),
            (heads, head_dim, width),
        ),
        same(f"{attention}/output_bias", f"{their_attention}.c_proj.bias", (width,)),
        reshaped(f"{mlp}/up", f"{their_mlp}.c_fc.weight", (width, hidden), (width, 1, hidden)),
        reshaped(f"{mlp}/up_bias", f"{their_mlp}.c_fc.bias", (hidden,), (1, hidden)),
        same(f"{mlp}/down", f"{their_mlp}.c_proj.weight", (hidden, width)),
        same(f"{mlp}/down_bias", f"{their_mlp}.c_proj.bias", (width,)),
    ]


def _norm(ours: str, theirs: str, width: int) -> list[Link]:
    return [
        same(f"{ours}/scale", f"{theirs}.weight", (width,)),
        same(f"{ours}/bias", f"{theirs}.bias", (width,)),
    ]


def _mask_complaint(mask: np.ndarray) -> str | None:
    if mask.ndim == 4 and np.array_equal(mask[0, 0] != 0, np.tri(mask.shape[-1], dtype=bool)):
        return None
    return "is not the causal mask that GPT-2 keeps there; get the weights again."
