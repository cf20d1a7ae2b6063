"""Huginn's config.json to our architecture and back.

Source: seal-rg/recurrent-pretraining, `raven_config_minimal.py` and the config.json of the
published model, tomg-group-umd/huginn-0125 (Geiping et al. 2025, arXiv 2502.05171).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from megatransformer_jax.checkpoints.compatibility import (
    SAME_UP_TO_ROUNDING,
    TRAINING_ONLY,
    flatten_config,
)
from megatransformer_jax.config.build import to_dict
from megatransformer_jax.config.layers import AttentionConfig, PositionConfig
from megatransformer_jax.config.model import (
    InitConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    RecurrenceConfig,
)
from megatransformer_jax.config.option import ConfigError, UserError

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


class HuginnFormatError(UserError):
    """Not a Huginn checkpoint that we can represent exactly, or a model that Huginn cannot be."""


def config_from_huginn(values: Mapping[str, Any], name: str = "config.json") -> ModelConfig:
    """Translates a Huginn config.json.

    Args:
      values: what is in the file.
      name: the file, for messages.

    Raises:
      HuginnFormatError: for missing keys, values of a wrong type or that cannot be, and values
        whose computation this package does not have.
    """
    for key, wanted in _FIXED.items():
        if values.get(key, wanted) != wanted:
            raise HuginnFormatError(
                f"{name}: {key} is {values[key]!r}, not {wanted!r}, so this model computes "
                "something else; only models like Huginn-0125 can be read."
            )
    known = _known_values(values, name)
    _check_derived(values, known, name)
    try:
        return _build(known)
    except ConfigError as error:
        raise HuginnFormatError(f"{name}: these values make no model: {error}") from error


def _known_values(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keys of `_KEYS` under their first names, and num_key_value_heads, all checked."""
    known = dict(values)
    for key, other in _OTHER_NAMES.items():
        if key not in known and other in known:
            known[key] = known[other]
    missing = [key for key in _KEYS if key not in known]
    if missing:
        raise HuginnFormatError(
            f"{name}: lacks {', '.join(missing)}; copy the file that came with the weights."
        )
    # As upstream's config class does.
    known.setdefault("num_key_value_heads", known["num_attention_heads"])
    for key, wanted in {**_KEYS, "num_key_value_heads": int}.items():
        if not _is_a(known[key], wanted):
            raise HuginnFormatError(
                f"{name}: {key} is {known[key]!r}; it must be of type {wanted.__name__}."
            )
    if known["state_init"] not in _STATE_INIT:
        raise HuginnFormatError(
            f"{name}: state_init is {known['state_init']!r}; known: {', '.join(_STATE_INIT)}."
        )
    return known


def _is_a(value: Any, wanted: type) -> bool:
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def _check_derived(values: Mapping[str, Any], known: Mapping[str, Any], name: str) -> None:
    """Checks what follows from other values, or is off in the published model."""
    heads = known["num_attention_heads"]
    if known["qk_bias"] and known["num_key_value_heads"] != heads:
        raise HuginnFormatError(
            f"{name}: qk_bias with num_key_value_heads={known['num_key_value_heads']} is not "
            f"defined: its tensor has a row for each of the num_attention_heads={heads} queries "
            "and of as many keys."
        )
    if "n_heads" in values and values["n_heads"] != heads:
        raise HuginnFormatError(
            f"{name}: n_heads={values['n_heads']!r} contradicts num_attention_heads={heads}; "
            "delete the wrong one."
        )
    if values.get("test_time_noise", 0):
        raise HuginnFormatError(
            f"{name}: test_time_noise is {values['test_time_noise']!r}; noise in the iterations "
            "is not supported, set it to 0."
        )
    width = known["n_embd"]
    derived = values.get("init_values", {})
    for key, wanted in (("embed_scale", math.sqrt(width)), ("std", math.sqrt(2 / (5 * width)))):
        value = derived.get(key, wanted) if isinstance(derived, Mapping) else derived
        if not _is_a(value, float) or not math.isclose(value, wanted, rel_tol=1e-5):
            raise HuginnFormatError(
                f"{name}: init_values.{key} is {value!r}; only the {wanted:.8g} that "
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


def config_to_huginn(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, which `config_from_huginn` reads as the same computation.

    Options of training alone have no place in it; `dropped_options` names them.

    Raises:
      HuginnFormatError: listing every option that Huginn's architecture does not have.
    """
    values = _values(config)
    lines = _differences(config, values)
    if lines:
        raise HuginnFormatError(
            "this model cannot be written as a Huginn, whose architecture is another:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nOnly a model trained with these values can be exported."
        )
    return values


def dropped_options(config: ModelConfig) -> list[str]:
    """Options, as 'model.name=value', that config.json has no place for.

    They tell how the model was trained or how it is computed, but not what it computes.
    """
    ours = _flat(config)
    theirs = _flat(config_from_huginn(config_to_huginn(config)))
    return [f"{path}={ours[path]!r}" for path in ours if ours[path] != theirs[path]]


def _values(config: ModelConfig) -> dict[str, Any]:
    """config.json as if the model were a Huginn; what it is besides is left out."""
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


def _differences(config: ModelConfig, values: Mapping[str, Any]) -> list[str]:
    """What would be computed otherwise if the model were read back from these values.

    Compared are whole configurations, so that an option which is new tomorrow is not overlooked.
    """
    lines = []
    if not config.is_recurrent:
        lines.append("model.core_layers: 0, Huginn has a core")
        config = dataclasses.replace(config, core_layers=1)
        values = {**values, "n_layers_in_recurrent_block": 1}
    if config.attention.qk_bias and config.attention.kv_heads != config.attention.num_heads:
        lines.append(
            f"model.attention.num_kv_heads: {config.attention.kv_heads}, with qk_bias Huginn has "
            f"as many as query heads, {config.attention.num_heads}"
        )
    try:
        theirs = _flat(_build(values))
    except ConfigError as error:  # Such as a width that the heads do not divide.
        return [*lines, f"model.{error}"]
    ours = _flat(config)
    free = {*TRAINING_ONLY, *SAME_UP_TO_ROUNDING}
    if config.recurrence.state_init == "like_init":
        free.remove("model.init.scheme")  # It decides the spread of the first state.
    lines += [
        f"{path}: {value!r}, Huginn's is {theirs[path]!r}"
        for path, value in ours.items()
        if value != theirs[path] and path not in free
    ]
    return lines


def _flat(config: ModelConfig) -> dict[str, Any]:
    """Options by dotted path, None resolved where it stands for another option's value."""
    resolved = to_dict(config)
    resolved["attention"]["num_kv_heads"] = config.attention.kv_heads
    resolved["attention"]["head_dim"] = config.head_dim(config.width)
    resolved["recurrence"]["core_width"] = config.core_width
    return flatten_config({"model": resolved})
