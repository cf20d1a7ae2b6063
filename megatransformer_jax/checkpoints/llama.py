"""The format of Llama, and what its relatives share with it.

Source: transformers 5, `models/llama` and `modeling_rope_utils.py`. Qwen 2, Qwen 3 and OLMo 2 name
their tensors alike and differ in biases, norms and windows (`llama_relatives.py`).
"""

import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from megatransformer_jax.checkpoints.foreign import (
    Format,
    Kind,
    canonical_windows,
    check_fixed,
    checked_values,
    is_of_model_type,
    plain_comparable,
    plain_layers,
    tied_head,
)
from megatransformer_jax.checkpoints.tensor_map import (
    Check,
    FormatError,
    Link,
    attention_output,
    reshaped,
    same,
    separate_gate,
    separate_qkv,
    transposed,
)
from megatransformer_jax.config.layers import (
    AttentionConfig,
    PositionConfig,
    RotaryScalingConfig,
)
from megatransformer_jax.config.model import MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.config.option import ConfigError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# For `tied_head`: the key of transformers, and the way out.
TIED_HEAD = (
    "tie_word_embeddings",
    "if the model has its own head, set it to false there.",
)

# Names that transformers has for activations; ours to the one that is written comes first.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "identity",
}

_DEFAULT_ACTIVATION = "silu"
_REQUIRED: dict[str, Kind] = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "max_position_embeddings": int,
}
_INT_OR_NONE = (int, types.NoneType)
_DICT_OR_NONE = (dict, types.NoneType)
_DEFAULTS: dict[str, tuple[Kind, Any]] = {
    "num_key_value_heads": (_INT_OR_NONE, None),
    "head_dim": (_INT_OR_NONE, None),
    "hidden_act": (str, _DEFAULT_ACTIVATION),
    "rms_norm_eps": (float, 1e-6),
    "tie_word_embeddings": (bool, False),
    "attention_bias": (bool, False),
    "attention_dropout": (float, 0.0),
    "mlp_bias": (bool, False),
    "rope_theta": ((float, types.NoneType), None),
    "rope_scaling": (_DICT_OR_NONE, None),
    "rope_parameters": (_DICT_OR_NONE, None),
    "use_sliding_window": (bool, False),
    "sliding_window": (_INT_OR_NONE, None),
    "max_window_layers": (int, 28),
    "layer_types": ((list, types.NoneType), None),
}
_DEFAULT_BASE = 10_000.0
# How far a stored table of frequencies may be off: it was rounded to 16 bits.
_FREQUENCY_TOLERANCE = 1e-2


class Llama(Format):
    """Folders of LlamaForCausalLM.

    Relatives are subclasses; the class attributes say in what they differ.
    """

    name = "llama"
    title = "Llama"
    base_prefix = "model."
    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    # Defaults of its config class, where they differ from Llama's.
    defaults: ClassVar[Mapping[str, Any]] = {}
    # Our norms of a layer to its names.
    norms: ClassVar[Mapping[str, str]] = {
        "attention_norm_in": "input_layernorm",
        "mlp_norm_in": "post_attention_layernorm",
    }
    placement: ClassVar[str] = "pre"
    # Its config.json has these keys; otherwise they would be ignored and must not be there.
    has_attention_bias: ClassVar[bool] = True
    has_mlp_bias: ClassVar[bool] = True
    has_head_dim: ClassVar[bool] = True
    has_windows: ClassVar[bool] = False

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """See `Format.recognises`."""
        return is_of_model_type(values, (self.model_type,), (self.architecture,))

    def read_config(self, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """See `Format.read_config`."""
        supported = f"only models like {self.architecture}'s are supported"
        check_fixed(values, {"quantization_config": None}, where, "get weights of full precision")
        for key, is_known in (
            ("attention_bias", self.has_attention_bias), ("mlp_bias", self.has_mlp_bias)
        ):  # fmt: skip
            if not is_known:
                check_fixed(values, {key: False}, where, supported)
        defaults = {
            key: (kind, self.defaults.get(key, default))
            for key, (kind, default) in _DEFAULTS.items()
        }
        known = checked_values(values, _REQUIRED, defaults, where)
        check_activation("hidden_act", known, where)
        try:
            return self._build(known, where)
        except ConfigError as error:
            raise FormatError(f"{where}: these values make no model: {error}") from error

    def _build(self, known: Mapping[str, Any], where: str) -> ModelConfig:
        layers = known["num_hidden_layers"]
        windows = self._windows(known, where) if self.has_windows else (None,) * layers
        attention = AttentionConfig(
            num_heads=known["num_attention_heads"],
            num_kv_heads=known["num_key_value_heads"] or known["num_attention_heads"],
            head_dim=known["head_dim"] if self.has_head_dim else None,
            dropout_rate=float(known["attention_dropout"]),
            **self.attention_options(known),
            **canonical_windows(windows),
        )
        return ModelConfig(
            vocab_size=known["vocab_size"],
            width=known["hidden_size"],
            max_length=known["max_position_embeddings"],
            prelude_layers=layers,
            core_layers=0,
            coda_layers=0,
            tie_embeddings=known["tie_word_embeddings"],
            attention=attention,
            positions=_read_positions(known, where),
            norm=NormConfig(placement=self.placement, eps=known["rms_norm_eps"]),
            mlp=MlpConfig(
                kind="gated",
                hidden_width=known["intermediate_size"],
                activation=ACTIVATIONS[known["hidden_act"]],
                bias=known["mlp_bias"],
            ),
        )

    def attention_options(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Options of attention that the checked values of config.json say."""
        bias = known["attention_bias"]
        return {"qkv_bias": bias, "output_bias": bias}

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """See `Format.write_config`."""
        attention, base = config.attention, config.positions.rotary_base
        values: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.mlp.hidden_width,
            "num_hidden_layers": config.prelude_layers,
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "hidden_act": activation_name(config.mlp.activation, _DEFAULT_ACTIVATION),
            "max_position_embeddings": config.max_length,
            "rms_norm_eps": config.norm.eps,
            "tie_word_embeddings": config.tie_embeddings,
            "attention_dropout": attention.dropout_rate,
            "rope_theta": base,
            "rope_scaling": _write_scaling(config.positions.scaling),
        }
        if self.has_head_dim:
            values["head_dim"] = config.head_dim(config.width)
        if self.has_attention_bias:
            values["attention_bias"] = attention.qkv_bias
        if self.has_mlp_bias:
            values["mlp_bias"] = config.mlp.bias
        if self.has_windows:
            values |= _write_windows(config)
        return values

    def comparable(self, config: ModelConfig) -> tuple[ModelConfig, list[str]]:
        """See `Format.comparable`."""
        return plain_comparable(self.title, config)

    def links(self, config: ModelConfig) -> list[Link]:
        """See `Format.links`."""
        width, vocabulary = config.width, (config.vocab_size, config.width)
        links = [same("embedding/embedding", EMBEDDING, vocabulary)]
        for number, ours in enumerate(plain_layers(config)):
            links += self._layer(ours, f"model.layers.{number}", config)
        links.append(same("final_norm/scale", "model.norm.weight", (width,)))
        if not config.tie_embeddings:
            links.append(same("embedding/head", HEAD, vocabulary))
        return links

    def _layer(self, ours: str, theirs: str, config: ModelConfig) -> list[Link]:
        width, hidden = config.width, config.mlp.hidden_width
        options, head_dim = config.attention, config.head_dim(width)
        attention, mlp = f"{ours}/attention", f"{ours}/mlp"
        their_attention, their_mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        query, key, value = (f"{their_attention}.{name}_proj" for name in "qkv")
        heads, kv_heads = options.num_heads, options.kv_heads

        def qkv(name: str, what: str, rest: tuple[int, ...]) -> Link:
            names = (f"{query}.{what}", f"{key}.{what}", f"{value}.{what}")
            return separate_qkv(f"{attention}/{name}", names, heads, kv_heads, rest)

        links = [
            same(f"{ours}/{name}/scale", f"{theirs}.{their_name}.weight", (width,))
            for name, their_name in self.norms.items()
        ]
        links.append(qkv("qkv", "weight", (head_dim, width)))
        if options.qkv_bias:
            links.append(qkv("qkv_bias", "bias", (head_dim,)))
        output = f"{their_attention}.o_proj"
        links.append(
            attention_output(f"{attention}/output", f"{output}.weight", heads, head_dim, width)
        )
        if options.output_bias:
            links.append(same(f"{attention}/output_bias", f"{output}.bias", (width,)))
        if options.qk_norm:
            links += _qk_norms(attention, their_attention, config)
        gate, up, down = (f"{their_mlp}.{name}_proj" for name in ("gate", "up", "down"))
        links.append(separate_gate(f"{mlp}/up", f"{gate}.weight", f"{up}.weight", hidden, width))
        links.append(transposed(f"{mlp}/down", f"{down}.weight", (width, hidden)))
        if config.mlp.bias:
            links.append(
                Link(
                    (f"{mlp}/up_bias",),
                    {f"{gate}.bias": (hidden,), f"{up}.bias": (hidden,)},
                    lambda gate, up: (np.stack([gate, up]),),
                    list,
                )
            )
            links.append(same(f"{mlp}/down_bias", f"{down}.bias", (width,)))
        return links

    def extras(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Mapping[str, Check]:
        """A head that is the embedding, and frequencies that early versions stored."""
        checks: dict[str, Check] = {
            f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (
                lambda table: _frequency_complaint(table, config)
            )
            for layer in range(config.prelude_layers)
        }
        if config.tie_embeddings:
            checks[HEAD] = tied_head(tensors, EMBEDDING, *TIED_HEAD)
        return checks

    def _windows(self, known: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
        layers, kinds = known["num_hidden_layers"], known["layer_types"]
        window = known["sliding_window"] if known["use_sliding_window"] else None
        if kinds is None:
            first = known["max_window_layers"] if window is not None else layers
            kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        kinds_known = ("full_attention", "sliding_attention")
        if len(kinds) != layers or any(kind not in kinds_known for kind in kinds):
            raise FormatError(
                f"{where}: layer_types is {kinds!r}; it must name {' or '.join(kinds_known)} for "
                f"each of the num_hidden_layers={layers} layers."
            )
        if window is None and "sliding_attention" in kinds:
            raise FormatError(
                f"{where}: layer_types has sliding_attention, but use_sliding_window is "
                f"{known['use_sliding_window']!r} and sliding_window {known['sliding_window']!r}; "
                "correct one of them."
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_activation(key: str, known: Mapping[str, Any], where: str) -> None:
    """Checks that the activation of config.json is one of ours.

    Raises:
      FormatError: otherwise.
    """
    if known[key] not in ACTIVATIONS:
        raise FormatError(f"{where}: {key} is {known[key]!r}; known: {', '.join(ACTIVATIONS)}.")


def activation_name(ours: str, default: str) -> str:
    """transformers' name of an activation, or the default if it has none; comparing the configs
    then says so."""
    return next((theirs for theirs, name in ACTIVATIONS.items() if name == ours), default)


def _qk_norms(ours: str, theirs: str, config: ModelConfig) -> list[Link]:
    """Scales of the norms of queries and keys: of one head, or of all of them."""
    options, head_dim = config.attention, config.head_dim(config.width)
    links = []
    for name, heads in (("query", options.num_heads), ("key", options.kv_heads)):
        our_name, their_name = f"{ours}/{name}_scale", f"{theirs}.{name[0]}_norm.weight"
        if options.qk_norm_span == "width":
            shape = (heads * head_dim,)
            links.append(reshaped(our_name, their_name, shape, (heads, head_dim)))
        else:
            links.append(same(our_name, their_name, (head_dim,)))
    return links


def _frequency_complaint(table: np.ndarray, config: ModelConfig) -> str | None:
    head_dim, base = config.head_dim(config.width), config.positions.rotary_base
    wanted = base ** -(np.arange(0, head_dim, 2) / head_dim)
    has_scaling = config.positions.scaling.kind != "none"
    is_equal = table.shape == wanted.shape and np.allclose(
        table.astype(np.float64), wanted, rtol=_FREQUENCY_TOLERANCE, atol=0
    )
    if is_equal or (has_scaling and table.shape == wanted.shape):
        return None
    return (
        f"is not the {wanted.shape} frequencies that rope_theta={base:g} and head_dim={head_dim} "
        "make; correct rope_theta in config.json."
    )


# ------------------------------------------------------------------------------
# Rotary positions. transformers 4 has rope_theta and rope_scaling, 5 puts both in rope_parameters.


# What a scaling has no default for.
_SCALING_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def _read_positions(known: Mapping[str, Any], where: str) -> PositionConfig:
    scaling = dict(known["rope_parameters"] or known["rope_scaling"] or {})
    base = scaling.get("rope_theta", known["rope_theta"])
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    check_fixed(scaling, {"partial_rotary_factor": 1.0}, where, "only whole heads are rotated")
    length = known["max_position_embeddings"]
    numbers = {
        key: value for key, value in scaling.items() if key not in ("rope_type", "type", "truncate")
    }
    wrong = [
        key
        for key, value in numbers.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)))
    ]
    if wrong:
        raise FormatError(f"{where}: {wrong[0]} is {scaling[wrong[0]]!r}; it must be a number.")
    return PositionConfig(
        rotary_base=float(_DEFAULT_BASE if base is None else base),
        scaling=_read_scaling(kind, scaling, length, where),
    )


def _read_scaling(
    kind: str, values: Mapping[str, Any], length: int, where: str
) -> RotaryScalingConfig:
    original = values.get("original_max_position_embeddings") or length
    missing = [key for key in _SCALING_NUMBERS.get(kind, ()) if values.get(key) is None]
    if missing:
        raise FormatError(
            f"{where}: the rotary scaling {kind!r} lacks {', '.join(missing)}; copy the file that "
            "came with the weights."
        )
    factor = values.get("factor")
    if factor is None and kind == "yarn":
        factor = length / original
    options: dict[str, Any] = {"kind": kind, "factor": float(factor or 1.0)}
    match kind:
        case "default":
            return RotaryScalingConfig()
        case "linear":
            pass
        case "llama3":
            options["original_length"] = original
            for key in ("low_freq_factor", "high_freq_factor"):
                options[key] = float(values[key])
        case "yarn":
            options["original_length"] = original
            options["beta_fast"] = float(values.get("beta_fast") or 32.0)
            options["beta_slow"] = float(values.get("beta_slow") or 1.0)
            options["attention_factor"] = _yarn_attention_factor(options["factor"], values)
            options["truncate"] = bool(values.get("truncate", True))
        case _:
            raise FormatError(
                f"{where}: rope_type is {kind!r}; known: default, linear, llama3, yarn."
            )
    if options["factor"] == 1.0 and options.get("attention_factor") in (None, 1.0):
        return RotaryScalingConfig()  # It changes nothing.
    return RotaryScalingConfig(**options)


def _yarn_attention_factor(factor: float, values: Mapping[str, Any]) -> float | None:
    """As transformers: given, or the ratio of two scales, or else (None) that of the paper."""
    given = values.get("attention_factor")
    if given is not None:
        return float(given)
    scale, scale_all = values.get("mscale"), values.get("mscale_all_dim")
    if not scale or not scale_all:
        return None
    return (0.1 * scale * math.log(factor) + 1.0) / (0.1 * scale_all * math.log(factor) + 1.0)


def _write_scaling(scaling: RotaryScalingConfig) -> dict[str, Any] | None:
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    names: tuple[str, ...]
    match scaling.kind:
        case "none":
            return None
        case "llama3":
            names = ("low_freq_factor", "high_freq_factor")
        case "yarn":
            names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        case _:
            return values
    values["original_max_position_embeddings"] = scaling.original_length
    given = {name: getattr(scaling, name) for name in names}
    return values | {name: value for name, value in given.items() if value is not None}


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    windows = config.windows("prelude")
    sizes = [window for window in windows if window is not None]
    first = next((i for i, window in enumerate(windows) if window is not None), len(windows))
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": max(sizes) if sizes else None,
        "max_window_layers": first,
        "layer_types": [
            "full_attention" if window is None else "sliding_attention" for window in windows
        ],
    }
