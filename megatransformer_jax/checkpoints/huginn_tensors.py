"""Huginn's tensors to our parameters and back.

Source: seal-rg/recurrent-pretraining, `raven_modeling_minimal.py`. Only names and layouts differ;
no value is computed, so importing and then exporting gives the same bytes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from megatransformer_jax.checkpoints.huginn_config import HuginnFormatError
from megatransformer_jax.checkpoints.safetensors_files import SafetensorsReader, shortened
from megatransformer_jax.config.model import ModelConfig

# Ours to upstream's, inside one layer.
_NORMS = {
    "attention_norm_in": "norm_1",
    "attention_norm_out": "norm_2",
    "mlp_norm_in": "norm_3",
    "mlp_norm_out": "norm_4",
}
_EMBEDDING = "transformer.wte.weight"
_FINAL_NORM = "transformer.ln_f.weight"
_ADAPTER = "transformer.adapter.weight"

# What some files hold besides the parameters, both checked and then left out: the head, which is
# the embedding, and the table of rotations, which follows from the config.
HEAD = "lm_head.weight"
ROTARY_TABLE = "freqs_cis"

# Largest difference of a cosine: the table is float32, whose angles at position 4096 are off by
# 1e-4, or was rounded to 16 bits.
_TABLE_TOLERANCE = 1e-2


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a Huginn, by its name, in the order of its layers."""
    width, hidden = config.width, config.mlp.hidden_width
    heads, head_dim = config.attention.num_heads, config.head_dim(config.width)
    layer: dict[str, tuple[int, ...]] = {
        "attn.Wqkv.weight": ((heads + 2 * config.attention.kv_heads) * head_dim, width),
        "attn.proj.weight": (width, heads * head_dim),
        "mlp.fc.weight": (2 * hidden, width),
        "mlp.proj.weight": (width, hidden),
    }
    if config.attention.qk_bias:
        layer["attn.qk_bias"] = (2, 1, heads, head_dim)
    layer |= {f"{name}.weight": (width,) for name in _NORMS.values()}
    shapes: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (config.vocab_size, width),
        _ADAPTER: (width, 2 * width),
        _FINAL_NORM: (width,),
    }
    for prefix, _, _ in _layers(config):
        shapes |= {f"{prefix}.{name}": shape for name, shape in layer.items()}
    return shapes


def params_from_huginn(
    tensors: Mapping[str, np.ndarray],
    config: ModelConfig,
    place: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """Our parameter tree from upstream's tensors.

    Args:
      tensors: by upstream's names; each is taken once, so they may be read as they are asked for.
      config: the architecture, from `config_from_huginn`.
      place: called with each parameter as soon as its layer is complete, such as to convert it or
        to put it on a device; its result is what the tree holds.

    Raises:
      HuginnFormatError: naming the tensors that are missing, unknown or of another shape than the
        config says, or if the head is not the embedding or the table of rotations another.
    """
    _check_names_and_shapes(tensors, config)
    embedding = tensors[_EMBEDDING]
    if HEAD in tensors and not np.array_equal(tensors[HEAD], embedding):
        raise HuginnFormatError(
            f"tensor {HEAD!r} is not equal to {_EMBEDDING!r}, although tie_embeddings is true in "
            "config.json; a head of its own is not supported."
        )
    if ROTARY_TABLE in tensors:
        _check_rotary_table(tensors[ROTARY_TABLE], config)
    params: dict[str, Any] = {
        "embedding": {"embedding": place(embedding)},
        "final_norm": {"scale": place(tensors[_FINAL_NORM])},
        "core": {"layers": {}},
    }
    state_half, embedding_half = np.split(tensors[_ADAPTER], 2, axis=1)
    params["core"]["adapter"] = {
        "state_kernel": place(state_half.T),
        "embedding_kernel": place(embedding_half.T),
    }
    for prefix, stack, layer in _layers(config):
        layers = params["core"]["layers"] if stack == "core" else params.setdefault(stack, {})
        layers[f"layer_{layer}"] = jax.tree.map(place, _layer_from_huginn(tensors, prefix, config))
    return params


def params_to_huginn(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Upstream's tensors from our parameter tree, the inverse of `params_from_huginn`."""
    return dict(iterate_huginn(params, config))


def iterate_huginn(
    params: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Upstream's names and tensors one by one, as `params_to_huginn`; only one is held."""
    adapter = params["core"]["adapter"]
    halves = [np.asarray(adapter[name]).T for name in ("state_kernel", "embedding_kernel")]
    yield _EMBEDDING, np.asarray(params["embedding"]["embedding"])
    yield _ADAPTER, np.concatenate(halves, axis=1)
    yield _FINAL_NORM, np.asarray(params["final_norm"]["scale"])
    for prefix, stack, layer in _layers(config):
        layers = params["core"]["layers"] if stack == "core" else params[stack]
        for name, tensor in _layer_to_huginn(layers[f"layer_{layer}"], config):
            yield f"{prefix}.{name}", tensor


def rotary_table(config: ModelConfig) -> np.ndarray:
    """Upstream's buffer `freqs_cis`: cosine and sine by position and channel pair.

    Returns:
      float32 [1, block_size, 1, head_dim / 2, 2].
    """
    head_dim = config.head_dim(config.width)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(config.positions.rotary_base) ** exponents
    angles = np.outer(np.arange(config.max_length, dtype=np.float32), frequencies)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)[None, :, None]


def _check_names_and_shapes(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    wanted = tensor_shapes(config)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise HuginnFormatError(
            f"tensors that the config asks for are missing: {shortened(missing)}; check the "
            "numbers of layers in config.json, and that the weights are of the same model."
        )
    unknown = sorted(set(tensors) - set(wanted) - {HEAD, ROTARY_TABLE})
    if unknown:
        raise HuginnFormatError(
            f"unknown tensors {shortened(unknown)}; this config has no use for them. Check the "
            "numbers of layers in config.json, and that the weights are of the same model."
        )
    wrong = [
        f"{name} is {shape}, not {wanted[name]}"
        for name in wanted
        if (shape := _shape(tensors, name)) != wanted[name]
    ]
    if wrong:
        raise HuginnFormatError(
            f"tensors do not have the shapes that config.json asks for: {shortened(wrong)}; "
            "config and weights are not of the same model."
        )


def _shape(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    return tensors.shape(name) if isinstance(tensors, SafetensorsReader) else tensors[name].shape


def _check_rotary_table(table: np.ndarray, config: ModelConfig) -> None:
    wanted = rotary_table(config)
    is_equal = table.shape == wanted.shape and np.allclose(
        table.astype(np.float32), wanted, rtol=0, atol=_TABLE_TOLERANCE
    )
    if not is_equal:
        raise HuginnFormatError(
            f"tensor {ROTARY_TABLE!r}, {table.shape}, is not the table of rotations {wanted.shape} "
            "that rope_base, block_size and the heads in config.json make; correct rope_base or "
            "block_size there."
        )


def _layers(config: ModelConfig) -> list[tuple[str, str, int]]:
    """(prefix of upstream's names, our stack, number in it) of every layer."""
    stacks = (
        ("prelude", "prelude", config.prelude_layers),
        ("core_block", "core", config.core_layers),
        ("coda", "coda", config.coda_layers),
    )
    return [
        (f"transformer.{theirs}.{layer}", ours, layer)
        for theirs, ours, count in stacks
        for layer in range(count)
    ]


def _layer_from_huginn(
    tensors: Mapping[str, np.ndarray], prefix: str, config: ModelConfig
) -> dict[str, Any]:
    heads, kv_heads = config.attention.num_heads, config.attention.kv_heads
    head_dim, width = config.head_dim(config.width), config.width
    qkv = tensors[f"{prefix}.attn.Wqkv.weight"]
    parts = np.split(qkv, [heads * head_dim, (heads + kv_heads) * head_dim])
    grouped = [part.reshape(kv_heads, -1, head_dim, width) for part in parts]
    attention = {
        "qkv": np.concatenate(grouped, axis=1).transpose(3, 0, 1, 2),
        "output": tensors[f"{prefix}.attn.proj.weight"].T.reshape(heads, head_dim, width),
    }
    if config.attention.qk_bias:
        query_bias, key_bias = tensors[f"{prefix}.attn.qk_bias"][:, 0]
        attention |= {"query_bias": query_bias, "key_bias": key_bias}
    gate_up = tensors[f"{prefix}.mlp.fc.weight"].reshape(2, -1, width)
    mlp = {"up": gate_up.transpose(2, 0, 1), "down": tensors[f"{prefix}.mlp.proj.weight"].T}
    norms = {
        ours: {"scale": tensors[f"{prefix}.{theirs}.weight"]} for ours, theirs in _NORMS.items()
    }
    return {"attention": attention, "mlp": mlp, **norms}


def _layer_to_huginn(
    layer: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    attention, mlp, width = layer["attention"], layer["mlp"], config.width
    group = config.attention.num_heads // config.attention.kv_heads
    grouped = np.asarray(attention["qkv"]).transpose(1, 2, 3, 0)
    parts = np.split(grouped, [group, group + 1], axis=1)
    yield "attn.Wqkv.weight", np.concatenate([part.reshape(-1, width) for part in parts])
    yield "attn.proj.weight", np.asarray(attention["output"]).reshape(-1, width).T
    if config.attention.qk_bias:
        biases = [np.asarray(attention[name]) for name in ("query_bias", "key_bias")]
        yield "attn.qk_bias", np.stack(biases)[:, None]
    yield "mlp.fc.weight", np.asarray(mlp["up"]).transpose(1, 2, 0).reshape(-1, width)
    yield "mlp.proj.weight", np.asarray(mlp["down"]).T
    for ours, theirs in _NORMS.items():
        yield f"{theirs}.weight", np.asarray(layer[ours]["scale"])
