"""The format of Huginn: a recurrent core between prelude and coda, read from and written to.

Source: seal-rg/recurrent-pretraining, `raven_config_minimal.py` and `raven_modeling_minimal.py`,
and the published model, tomg-group-umd/huginn-0125 (Geiping et al. 2025, arXiv 2502.05171).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from megatransformer_jax.checkpoints.foreign import (
    Format,
    check_fixed,
    checked_values,
    is_a,
    is_of_model_type,
    tied_head,
)
from megatransformer_jax.checkpoints.tensor_map import (
    Check,
    FormatError,
    Link,
    attention_output,
    fused_gate,
    fused_qkv,
    linear_adapter,
    same,
    stacked_qk_bias,
    transposed,
)
from megatransformer_jax.config.layers import AttentionConfig, PositionConfig
from megatransformer_jax.config.model import InitConfig, MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import RecurrenceConfig

MODEL_TYPE = "huginn_raven"

# Upstream's state_init to ours.
_STATE_INIT = {"like-init": "like_init", "normal": "normal", "zero": "zero", "unit": "unit"}

# What must be in the file, and its type.
_KEYS: dict[str, type] = {
    "n_embd": int,
    "num_attention_heads": int,
    "intermediate_size": int,
    "padded_vocab_size": int,
    "block_size": int,
    "qk_bias": bool,
    "n_layers_in_prelude": int,
    "n_layers_in_recurrent_block": int,
    "n_layers_in_coda": int,
    "mean_recurrence": int,
    "mean_backprop_depth": int,
    "norm_eps": float,
    "rope_base": float,
    "state_init": str,
}

# Other names under which upstream's versions store the same. (The published file has both names of
# the vocabulary's size, always with one value: its config class sets the one to the other.)
_OTHER_NAMES = {"num_attention_heads": "n_heads", "padded_vocab_size": "vocab_size"}

# What this package computes; with any other value the result would differ. Absent: upstream's
# default, which is this one.
_FIXED = {
    "model_type": MODEL_TYPE,
    "architecture_class_name": "RecurrentGPT",
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

# Upstream draws depths without a bound. A draw above so many times the mean is rarer than 1 in
# 10,000 (see gin/huginn_3_5b.gin).
_MAX_STEPS_PER_MEAN = 8

# Ours to upstream's, inside one layer.
_NORMS = {
    "attention_norm_in": "norm_1",
    "attention_norm_out": "norm_2",
    "mlp_norm_in": "norm_3",
    "mlp_norm_out": "norm_4",
}
_EMBEDDING = "transformer.wte.weight"
_ADAPTER = "transformer.adapter.weight"

# What some files hold besides the parameters, both checked and then left out: the head, which is
# the embedding, and the table of rotations, which follows from the config.
HEAD = "lm_head.weight"
ROTARY_TABLE = "freqs_cis"

# Largest difference of a cosine: the table is float32, whose angles at position 4096 are off by
# 1e-4, or was rounded to 16 bits.
_TABLE_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Huginn(Format):
    """Folders like that of Huginn-0125.

    Attributes:
      with_rotary_table: also writes `freqs_cis`, the table of rotations, which follows from the
        config but which upstream's model class expects among the weights.
    """

    with_rotary_table: bool = False

    name = "huginn"
    title = "Huginn"

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By model_type, or by the key that no other format has."""
        if "model_type" not in values and "n_layers_in_recurrent_block" in values:
            return "_class_name" not in values  # Parcae has the key as well.
        return is_of_model_type(values, (MODEL_TYPE,), ("RavenForCausalLM",))

    def read_config(self, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """See `Format.read_config`."""
        check_fixed(values, _FIXED, where, "only models like Huginn-0125 can be read")
        known = _known_values(values, where)
        _check_derived(values, known, where)
        try:
            return _build(known)
        except ConfigError as error:
            raise FormatError(f"{where}: these values make no model: {error}") from error

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """See `Format.write_config`."""
        recurrence = config.recurrence
        names = {ours: theirs for theirs, ours in _STATE_INIT.items()}
        base = config.positions.rotary_base
        heads = config.attention.num_heads
        return {
            "architectures": ["RavenForCausalLM"],
            "n_embd": config.width,
            "n_heads": heads,
            "num_attention_heads": heads,
            "num_key_value_heads": config.attention.kv_heads,
            "intermediate_size": config.mlp.hidden_width,
            "vocab_size": config.vocab_size,
            "padded_vocab_size": config.vocab_size,
            "block_size": config.max_length,
            "qk_bias": config.attention.qk_bias,
            "n_layers": config.prelude_layers + config.core_layers + config.coda_layers,
            "n_layers_in_prelude": config.prelude_layers,
            "n_layers_in_recurrent_block": config.core_layers,
            "n_layers_in_coda": config.coda_layers,
            "mean_recurrence": recurrence.mean_steps,
            "mean_backprop_depth": recurrence.backprop_depth,
            "norm_eps": config.norm.eps,
            "rope_base": int(base) if base.is_integer() else base,
            "state_init": names.get(recurrence.state_init, "like-init"),
            **_FIXED,
        }

    def comparable(self, config: ModelConfig) -> tuple[ModelConfig, list[str]]:
        """See `Format.comparable`."""
        lines = []
        attention = config.attention
        if not config.is_recurrent:
            lines.append("model.core_layers: 0, Huginn has a core")
            config = dataclasses.replace(config, core_layers=1)
        if attention.qk_bias and attention.kv_heads != attention.num_heads:
            lines.append(
                f"model.attention.num_kv_heads: {attention.kv_heads}, with qk_bias Huginn has "
                f"as many as query heads, {attention.num_heads}"
            )
            attention = dataclasses.replace(attention, num_kv_heads=attention.num_heads)
            config = dataclasses.replace(config, attention=attention)
        return config, lines

    def decisive_options(self, config: ModelConfig) -> set[str]:
        """The initialisation decides the spread of the first state."""
        return {"model.init.scheme"} if config.recurrence.state_init == "like_init" else set()

    def links(self, config: ModelConfig) -> list[Link]:
        """See `Format.links`."""
        width = config.width
        links = [
            same("embedding/embedding", _EMBEDDING, (config.vocab_size, width)),
            linear_adapter("core/adapter", _ADAPTER, width),
            same("final_norm/scale", "transformer.ln_f.weight", (width,)),
        ]
        stacks = (
            ("prelude", "prelude", config.prelude_layers),
            ("core_block", "core/layers", config.core_layers),
            ("coda", "coda", config.coda_layers),
        )
        for theirs, ours, count in stacks:
            for layer in range(count):
                links += _layer(f"{ours}/layer_{layer}", f"transformer.{theirs}.{layer}", config)
        return links

    def extras(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Mapping[str, Check]:
        """See `Format.extras`."""
        return {
            HEAD: tied_head(
                tensors, _EMBEDDING, "tie_embeddings", "another head is not supported."
            ),
            ROTARY_TABLE: lambda table: _table_complaint(table, config),
        }

    def buffers(self, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
        """See `Format.buffers`."""
        if self.with_rotary_table:
            yield ROTARY_TABLE, rotary_table(config)


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


# ------------------------------------------------------------------------------
# config.json.


def _known_values(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of `_KEYS` under their first names, and num_key_value_heads, all checked."""
    named = dict(values)
    for key, other in _OTHER_NAMES.items():
        if key not in named and other in named:
            named[key] = named[other]
    # As upstream's config class does.
    heads = named.get("num_attention_heads")
    known = checked_values(named, _KEYS, {"num_key_value_heads": (int, heads)}, where)
    if known["state_init"] not in _STATE_INIT:
        raise FormatError(
            f"{where}: state_init is {known['state_init']!r}; known: {', '.join(_STATE_INIT)}."
        )
    return known


def _check_derived(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Checks what follows from other values, or is off in the published model."""
    heads = known["num_attention_heads"]
    if known["qk_bias"] and known["num_key_value_heads"] != heads:
        raise FormatError(
            f"{where}: qk_bias with num_key_value_heads={known['num_key_value_heads']} is not "
            f"defined: its tensor has a row for each of the num_attention_heads={heads} queries "
            "and of as many keys."
        )
    if "n_heads" in values and values["n_heads"] != heads:
        raise FormatError(
            f"{where}: n_heads={values['n_heads']!r} contradicts num_attention_heads={heads}; "
            "delete the wrong one."
        )
    if values.get("test_time_noise", 0):
        raise FormatError(
            f"{where}: test_time_noise is {values['test_time_noise']!r}; noise in the iterations "
            "is not supported, set it to 0."
        )
    width = known["n_embd"]
    derived = values.get("init_values", {})
    for key, wanted in (("embed_scale", math.sqrt(width)), ("std", math.sqrt(2 / (5 * width)))):
        value = derived.get(key, wanted) if isinstance(derived, Mapping) else derived
        if not is_a(value, float) or not math.isclose(value, wanted, rel_tol=1e-5):
            raise FormatError(
                f"{where}: init_values.{key} is {value!r}; only the {wanted:.8g} that "
                f"init_strategy 'takase' gives for n_embd={width} is supported."
            )


def _build(known: Mapping[str, Any]) -> ModelConfig:
    mean, depth = known["mean_recurrence"], known["mean_backprop_depth"]
    most = max(RecurrenceConfig().max_steps, _MAX_STEPS_PER_MEAN * mean, depth)
    return ModelConfig(
        vocab_size=known["padded_vocab_size"],
        width=known["n_embd"],
        max_length=known["block_size"],
        prelude_layers=known["n_layers_in_prelude"],
        core_layers=known["n_layers_in_recurrent_block"],
        coda_layers=known["n_layers_in_coda"],
        tie_embeddings=True,
        scale_embeddings=True,
        attention=AttentionConfig(
            num_heads=known["num_attention_heads"],
            num_kv_heads=known["num_key_value_heads"],
            qk_bias=known["qk_bias"],
        ),
        positions=PositionConfig(
            rotary_base=float(known["rope_base"]), rotary_convention="interleaved"
        ),
        norm=NormConfig(placement="sandwich", eps=known["norm_eps"]),
        mlp=MlpConfig(hidden_width=known["intermediate_size"]),
        init=InitConfig(scheme="takase"),
        recurrence=RecurrenceConfig(
            adapter="linear",
            state_init=_STATE_INIT[known["state_init"]],
            mean_steps=mean,
            backprop_depth=depth,
            max_steps=most,
        ),
    )


# ------------------------------------------------------------------------------
# Tensors.


def _layer(ours: str, theirs: str, config: ModelConfig) -> list[Link]:
    width, hidden = config.width, config.mlp.hidden_width
    heads, kv_heads = config.attention.num_heads, config.attention.kv_heads
    head_dim = config.head_dim(width)
    attention, mlp = f"{ours}/attention", f"{ours}/mlp"
    links = [
        fused_qkv(
            f"{attention}/qkv", f"{theirs}.attn.Wqkv.weight", heads, kv_heads, (head_dim, width)
        ),
        attention_output(
            f"{attention}/output", f"{theirs}.attn.proj.weight", heads, head_dim, width
        ),
        fused_gate(f"{mlp}/up", f"{theirs}.mlp.fc.weight", hidden, width),
        transposed(f"{mlp}/down", f"{theirs}.mlp.proj.weight", (width, hidden)),
    ]
    if config.attention.qk_bias:
        links.append(stacked_qk_bias(attention, f"{theirs}.attn.qk_bias", heads, head_dim))
    links += [
        same(f"{ours}/{a}/scale", f"{theirs}.{b}.weight", (width,)) for a, b in _NORMS.items()
    ]
    return links


def _table_complaint(table: np.ndarray, config: ModelConfig) -> str | None:
    wanted = rotary_table(config)
    is_equal = table.shape == wanted.shape and np.allclose(
        table.astype(np.float32), wanted, rtol=0, atol=_TABLE_TOLERANCE
    )
    if is_equal:
        return None
    return (
        f"is {table.shape} and not the table of rotations {wanted.shape} that rope_base, "
        "block_size and the heads in config.json make; correct rope_base or block_size there."
    )
