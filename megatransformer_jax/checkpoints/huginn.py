"""Huginn checkpoints (config.json and model.safetensors) to our parameters and back.

Source: seal-rg/recurrent-pretraining, `raven_modeling_minimal.py`. Only names and layouts differ;
no value is computed, so importing and then exporting gives the same bytes.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from megatransformer_jax.config.model import (
    AttentionConfig,
    InitConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    RecurrenceConfig,
)
from megatransformer_jax.config.option import UserError

# Ours to upstream's, inside one layer.
_NORMS = {
    "attention_norm_in": "norm_1",
    "attention_norm_out": "norm_2",
    "mlp_norm_in": "norm_3",
    "mlp_norm_out": "norm_4",
}
_STATE_INIT = {"like-init": "like_init", "normal": "normal", "zero": "zero", "unit": "unit"}
# What the importer can represent; any other value would change the computation silently.
_REQUIRED = {
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "sampling_scheme": "poisson-lognormal-filling",
    "init_strategy": "takase",
    "injection_type": "linear",
    "tie_embeddings": True,
    "bias": False,
}


class HuginnFormatError(UserError):
    """A folder that is not a Huginn checkpoint which we can represent exactly."""


def load_huginn(folder: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a checkpoint folder.

    Returns:
      The architecture and the parameters, in the tree of `init_params`, as float32 NumPy arrays.

    Raises:
      HuginnFormatError: missing files or tensors, unknown tensors, or an unsupported config value.
    """
    folder = pathlib.Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise HuginnFormatError(f"{folder / name} does not exist; name a folder that has it.")
    config = config_from_huginn(json.loads((folder / "config.json").read_text()))
    return config, params_from_huginn(load_file(folder / "model.safetensors"), config)


def config_from_huginn(values: dict[str, Any]) -> ModelConfig:
    """Translates a Huginn config.json.

    Raises:
      HuginnFormatError: for a value whose computation this package does not have.
    """
    for name, wanted in _REQUIRED.items():
        if values.get(name, wanted) != wanted:
            raise HuginnFormatError(f"config.json: {name} is {values[name]!r}, not {wanted!r}.")
    if values["state_init"] not in _STATE_INIT:
        known = ", ".join(_STATE_INIT)
        raise HuginnFormatError(
            f"config.json: state_init is {values['state_init']!r}; known: {known}."
        )
    return ModelConfig(
        vocab_size=values["padded_vocab_size"],
        width=values["n_embd"],
        max_length=values["block_size"],
        prelude_layers=values["n_layers_in_prelude"],
        core_layers=values["n_layers_in_recurrent_block"],
        coda_layers=values["n_layers_in_coda"],
        tie_embeddings=True,
        scale_embeddings=True,
        attention=AttentionConfig(
            num_heads=values["num_attention_heads"],
            num_kv_heads=values["num_key_value_heads"],
            qk_bias=values["qk_bias"],
        ),
        positions=PositionConfig(
            rotary_base=float(values["rope_base"]), rotary_convention="interleaved"
        ),
        norm=NormConfig(placement="sandwich", eps=values["norm_eps"]),
        mlp=MlpConfig(hidden_width=values["intermediate_size"]),
        init=InitConfig(scheme="takase"),
        recurrence=RecurrenceConfig(
            adapter="linear",
            state_init=_STATE_INIT[values["state_init"]],
            mean_steps=values["mean_recurrence"],
            backprop_depth=values["mean_backprop_depth"],
        ),
    )


def params_from_huginn(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """Our parameter tree from upstream's tensors.

    Raises:
      HuginnFormatError: naming the tensors that are missing or left over.
    """
    left = {name: np.asarray(tensor) for name, tensor in tensors.items()}

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise HuginnFormatError(f"tensor {name!r} is missing; the config asks for it.")
        return left.pop(name)

    params: dict[str, Any] = {
        "embedding": {"embedding": take("transformer.wte.weight")},
        "final_norm": {"scale": take("transformer.ln_f.weight")},
        "core": {"layers": {}},
    }
    state_half, embedding_half = np.split(take("transformer.adapter.weight"), 2, axis=1)
    params["core"]["adapter"] = {
        "state_kernel": state_half.T,
        "embedding_kernel": embedding_half.T,
    }
    for stack, ours, layer in _layers(config):
        layers = params["core"]["layers"] if ours == "core" else params.setdefault(ours, {})
        layers[f"layer_{layer}"] = _layer_from_huginn(take, f"transformer.{stack}.{layer}", config)
    if left:
        raise HuginnFormatError(f"unknown tensors {sorted(left)}; this config has no use for them.")
    return params


def params_to_huginn(params: dict[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Upstream's tensors from our parameter tree, the inverse of `params_from_huginn`."""
    adapter = params["core"]["adapter"]
    halves = [np.asarray(adapter[name]).T for name in ("state_kernel", "embedding_kernel")]
    tensors = {
        "transformer.wte.weight": np.asarray(params["embedding"]["embedding"]),
        "transformer.ln_f.weight": np.asarray(params["final_norm"]["scale"]),
        "transformer.adapter.weight": np.concatenate(halves, axis=1),
    }
    for stack, ours, layer in _layers(config):
        layers = params["core"]["layers"] if ours == "core" else params[ours]
        tensors |= _layer_to_huginn(
            layers[f"layer_{layer}"], f"transformer.{stack}.{layer}", config
        )
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _layers(config: ModelConfig) -> list[tuple[str, str, int]]:
    """(upstream's stack, our stack, layer) of every layer."""
    stacks = (
        ("prelude", "prelude", config.prelude_layers),
        ("core_block", "core", config.core_layers),
        ("coda", "coda", config.coda_layers),
    )
    return [(stack, ours, layer) for stack, ours, count in stacks for layer in range(count)]


def _layer_from_huginn(
    take: Callable[[str], np.ndarray], prefix: str, config: ModelConfig
) -> dict[str, Any]:
    heads, kv_heads = config.attention.num_heads, config.attention.kv_heads
    head_dim, width = config.head_dim(config.width), config.width
    qkv = take(f"{prefix}.attn.Wqkv.weight")
    parts = np.split(qkv, [heads * head_dim, (heads + kv_heads) * head_dim])
    grouped = [part.reshape(kv_heads, -1, head_dim, width) for part in parts]
    attention = {
        "qkv": np.concatenate(grouped, axis=1).transpose(3, 0, 1, 2),
        "output": take(f"{prefix}.attn.proj.weight").T.reshape(heads, head_dim, width),
    }
    if config.attention.qk_bias:
        query_bias, key_bias = take(f"{prefix}.attn.qk_bias")[:, 0]
        attention |= {"query_bias": query_bias, "key_bias": key_bias}
    gate_up = take(f"{prefix}.mlp.fc.weight").reshape(2, -1, width)
    mlp = {"up": gate_up.transpose(2, 0, 1), "down": take(f"{prefix}.mlp.proj.weight").T}
    norms = {ours: {"scale": take(f"{prefix}.{theirs}.weight")} for ours, theirs in _NORMS.items()}
    return {"attention": attention, "mlp": mlp, **norms}


def _layer_to_huginn(
    layer: dict[str, Any], prefix: str, config: ModelConfig
) -> dict[str, np.ndarray]:
    attention, mlp, width = layer["attention"], layer["mlp"], config.width
    group = config.attention.num_heads // config.attention.kv_heads
    grouped = np.asarray(attention["qkv"]).transpose(1, 2, 3, 0)
    parts = np.split(grouped, [group, group + 1], axis=1)
    tensors = {
        "attn.Wqkv.weight": np.concatenate([part.reshape(-1, width) for part in parts]),
        "attn.proj.weight": np.asarray(attention["output"]).reshape(-1, width).T,
        "mlp.fc.weight": np.asarray(mlp["up"]).transpose(1, 2, 0).reshape(-1, width),
        "mlp.proj.weight": np.asarray(mlp["down"]).T,
    }
    if config.attention.qk_bias:
        biases = [np.asarray(attention[name]) for name in ("query_bias", "key_bias")]
        tensors["attn.qk_bias"] = np.stack(biases)[:, None]
    for ours, theirs in _NORMS.items():
        tensors[f"{theirs}.weight"] = np.asarray(layer[ours]["scale"])
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
