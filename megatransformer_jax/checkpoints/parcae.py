"""The format of Parcae: diagonal injection, a read-out matrix, value embeddings.

Source: SandyResearch/parcae, `parcae_lm/models/parcae/` and `parcae_lm/modules/` (Prairie et al.
2026, arXiv 2604.12946). Its folders hold `config.json`, which names its class as `_class_name`, and
a pickle of PyTorch. We read that where torch is installed, and safetensors of the same names.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from megatransformer_jax.checkpoints.foreign import (
    Format,
    check_fixed,
    checked_values,
    is_a,
    tied_head,
)
from megatransformer_jax.checkpoints.huginn import HEAD, ROTARY_TABLE
from megatransformer_jax.checkpoints.safetensors_files import INDEX_FILE, PICKLES, SINGLE_FILE
from megatransformer_jax.checkpoints.tensor_map import (
    Check,
    FormatError,
    Link,
    attention_output,
    fused_gate,
    linear_adapter,
    same,
    separate_qkv,
    stacked_qk_bias,
    transposed,
)
from megatransformer_jax.config.layers import (
    AttentionConfig,
    PositionConfig,
    RotaryScalingConfig,
    ValueEmbeddingConfig,
)
from megatransformer_jax.config.model import InitConfig, MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import RecurrenceConfig

CLASS_NAME = "ParcaeConfig"
# What upstream saves weights as, besides safetensors, which it does not write.

# What must be in the file, and its type.
_KEYS: dict[str, Any] = {
    "vocab_size": int,
    "block_size": int,
    "n_embd": int,
    "num_attention_heads": int,
    "n_layers_in_prelude": int,
    "n_layers_in_recurrent_block": int,
    "n_layers_in_coda": int,
    "mean_recurrence": int,
    "mean_backprop_depth": int,
}
# Of the others their types, and upstream's defaults. None stands for what other values say.
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "padded_vocab_size": ((int, type(None)), None),
    "padding_multiple": (int, 512),
    "num_key_value_heads": ((int, type(None)), None),
    "recurrent_num_attention_heads": ((int, type(None)), None),
    "intermediate_size": ((int, type(None)), None),
    "recurrent_embedding_dimension": (int, 1024),
    "recurrent_intermediation_embedding_dimension": (int, 3520),
    "norm_class_name": (str, "LayerNorm"),
    "norm_eps": (float, 1e-5),
    "mlp_class_name": (str, "BaseMLP"),
    "nonlin_name": (str, "GELU"),
    "qk_norm": (bool, False),
    "qk_bias": (bool, False),
    "prelude_norm": (bool, False),
    "logit_softcap": ((float, type(None)), None),
    "tie_embeddings": (bool, False),
    "init_strategy": (str, "scaled"),
    "injection_type": (str, "diagonal"),
    "state_init": (str, "like-init"),
    "sampling_scheme": (str, "poisson-truncated-full"),
    "recurrent_iteration_method": (str, "per-batch"),
}
_ROPE = {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 50_000}
# What this package computes; with any other value the result would differ.
_FIXED = {
    "_class_name": CLASS_NAME,
    "block_class_name": "TransformerPreNormBlock",
    "bias": False,
    "clip_qkv": None,
    "simple_ops": False,
    "mup_model_scaling_factor": 1,
    "use_abacus": False,
    "randomize_positions_from": None,
}

# Upstream's names to ours.
_NORMS = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}
_MLPS = {"BaseMLP": "mlp", "GatedMLP": "gated"}
_ACTIVATIONS = {
    "GELU": "gelu",
    "ReLU": "relu",
    "ReLU2": "relu_squared_half",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Identity": "identity",
}
_ADAPTERS = {"diagonal": "diagonal", "linear": "linear", "add": "sum"}
_STATE_INIT = {
    name: name.replace("-", "_") for name in ("like-init", "normal", "embed", "zero", "unit")
}
_SAMPLING = {"poisson-truncated-full": "truncated_poisson", "fixed": "fixed"}
_DRAW_PER = {"per-batch": "batch", "per-sequence": "sequence", "per-token": "token"}
# Standard deviation of token embeddings, and so of a first state 'like-init', at width D. Takase's
# also scales embeddings by sqrt(D). Strategies that scale logits are not among them.
_TAKASE_STD = ("scaled", "takase", "scaled-zero", "scaled-geiping", "scaled-stuck", "small")
_ZERO_OUTPUTS = "scaled-zero"
_OTHER_STD = {
    "mitchell": lambda width: 1 / math.sqrt(width),
    "normal": lambda width: 1 / math.sqrt(width),
    "bert": lambda width: 0.02,
    "megatron": lambda width: 0.02,
    "llama": lambda width: 1.0,
    "llama-by-dim": lambda width: 1.0,
}

# PyTorch's default for norms without parameters: the distance from 1 to the next float32.
_QK_NORM_EPS = float(np.finfo(np.float32).eps)
_GATE_CHANNELS = 32
# Upstream draws depths without a bound; see huginn.py.
_MAX_STEPS_PER_MEAN = 8
_EMBEDDING = "transformer.wte.weight"
_ADAPTER = "transformer.adapter"
# Largest difference of a cosine between two tables of rotations, as Huginn's.
_TABLE_TOLERANCE = 1e-3


class Parcae(Format):
    """See the module."""

    name = "parcae"
    title = "Parcae"
    has_value_embeddings = True
    names_dtype = False  # Upstream's config class takes no keys but its own.

    def recognises(self, values: Mapping[str, Any]) -> bool:
        """By its class."""
        return values.get("_class_name") == CLASS_NAME

    def read_config(self, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """See `Format.read_config`."""
        check_fixed(values, _FIXED, where, "it cannot be read")
        known = checked_values(values, _KEYS, _DEFAULTS, where)
        known |= _known_rotation(values, where)
        _resolve(known)
        _check_choices(known, where)
        _check_core(known, where)
        try:
            return _build(known)
        except ConfigError as error:
            raise FormatError(f"{where}: these values make no model: {error}") from error

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """See `Format.write_config`."""
        recurrence, heads = config.recurrence, config.attention.num_heads
        hidden = config.mlp.hidden_width
        return {
            **_FIXED,
            "vocab_size": config.vocab_size,
            "padded_vocab_size": config.vocab_size,
            "block_size": config.max_length,
            "n_embd": config.width,
            "num_attention_heads": heads,
            "num_key_value_heads": config.attention.kv_heads,
            "intermediate_size": hidden,
            "recurrent_embedding_dimension": config.core_width,
            "recurrent_intermediation_embedding_dimension": hidden,
            "n_layers_in_prelude": config.prelude_layers,
            "n_layers_in_recurrent_block": config.core_layers,
            "n_layers_in_coda": config.coda_layers,
            "mean_recurrence": recurrence.mean_steps,
            "mean_backprop_depth": recurrence.backprop_depth,
            "norm_class_name": _named(_NORMS, config.norm.kind),
            "norm_eps": config.norm.eps,
            "mlp_class_name": _named(_MLPS, config.mlp.kind),
            "nonlin_name": _named(_ACTIVATIONS, config.mlp.activation),
            "qk_norm": config.attention.qk_norm,
            "qk_bias": config.attention.qk_bias,
            "prelude_norm": recurrence.injection_norm,
            "logit_softcap": config.logit_softcap,
            "tie_embeddings": config.tie_embeddings,
            "init_strategy": _strategy(config),
            "injection_type": _named(_ADAPTERS, recurrence.adapter),
            "state_init": _named(_STATE_INIT, recurrence.state_init),
            "sampling_scheme": _named(_SAMPLING, recurrence.sampling),
            "recurrent_iteration_method": _named(_DRAW_PER, recurrence.draw_per),
            "rope_settings": _rope_settings(config.positions),
        }

    def comparable(self, config: ModelConfig) -> tuple[ModelConfig, list[str]]:
        """See `Format.comparable`."""
        if config.is_recurrent:
            return config, []
        recurrence = dataclasses.replace(config.recurrence, output_norm=False, readout_matrix=True)
        config = dataclasses.replace(config, core_layers=1, recurrence=recurrence)
        return config, ["model.core_layers: 0, Parcae has a core"]

    def decisive_options(self, config: ModelConfig) -> set[str]:
        """The initialisation decides the spread of the first state."""
        decides = config.recurrence.state_init == "like_init"
        return {"model.init.scheme", "model.init.std"} if decides else set()

    def links(self, config: ModelConfig) -> list[Link]:
        """See `Format.links`."""
        vocab_size, width = config.vocab_size, config.width
        links = [
            same("embedding/embedding", _EMBEDDING, (vocab_size, width)),
            transposed("c_matrix", "transformer.C.weight", (width, width)),
            *_norm("final_norm", "transformer.ln_f", config),
            *_adapter(config),
        ]
        if not config.tie_embeddings:
            links.append(same("embedding/head", HEAD, (vocab_size, width)))
        if config.recurrence.injection_norm:
            links += _norm("injection_norm", "transformer.ln_prelude", config)
        values = (vocab_size, config.attention.kv_heads * config.head_dim(width))
        for layer in config.value_embedding.layers:
            ours = f"value_embedding/layer_{layer}_embedding"
            links.append(same(ours, f"value_embeds.{layer}.weight", values))
        for stack, layer, theirs in _layers(config):
            ours = f"{'core/layers' if stack == 'core' else stack}/layer_{layer}"
            links += _layer(ours, theirs, config)
            if layer in config.value_layers(stack):
                shape = (config.attention.kv_heads, _GATE_CHANNELS)
                name = f"{theirs}.attn.ve_gate.weight"
                links.append(transposed(f"{ours}/attention/value_gate", name, shape))
        return links

    def extras(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Mapping[str, Check]:
        """A tied head, the table of rotations, and what upstream makes and never reads: gates of
        layers without value embeddings, and value embeddings of layers without a gate."""
        checks: dict[str, Check] = {ROTARY_TABLE: lambda table: _table_complaint(table, config)}
        if config.tie_embeddings:
            checks[HEAD] = tied_head(
                tensors, _EMBEDDING, "tie_embeddings", "set it to false there."
            )
        gated, embedded = _value_layers(_numbers(config))
        names = [theirs for _, _, theirs in _layers(config)]
        for layer in gated ^ embedded:
            name = f"value_embeds.{layer}.weight"
            if layer in gated:
                name = f"{names[layer]}.attn.ve_gate.weight"
            checks[name] = lambda tensor: None
        return checks

    def buffers(self, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
        """The table of rotations if it is not upstream's default, since its loader drops
        `rope_settings` and takes the table."""
        is_rotary = config.positions.scheme == "rotary"
        if is_rotary and _rope_settings(config.positions) != _ROPE:
            yield ROTARY_TABLE, rotary_table(config)

    def open_tensors(self, folder: pathlib.Path) -> Mapping[str, np.ndarray]:
        """See `Format.open_tensors`; of a folder with a pickle alone, all that is in it."""
        pickles = [folder / name for name in PICKLES if (folder / name).is_file()]
        if pickles and not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
            return read_pickle(pickles[0])
        return super().open_tensors(folder)


def read_pickle(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file that PyTorch has saved; nothing in it is executed.

    Raises:
      FormatError: if torch is not installed, or the file is damaged or holds more than tensors.
    """
    try:
        import torch  # noqa: PLC0415  (An optional package.)
    except ImportError as error:
        raise FormatError(
            f"{path}: a pickle of PyTorch, which only torch reads, and it cannot be imported "
            f"({error}). Install it (pip install torch), or convert the file where it is "
            'installed: python -c "import torch, safetensors.torch as s; '
            f"d = torch.load('{path.name}', map_location='cpu', weights_only=True); "
            "s.save_file({n: t.clone() for n, t in d.items()}, 'model.safetensors')\""
        ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Of many types: it is whatever unpickling raises.
        first_line = str(error).strip().partition("\n")[0]
        raise FormatError(
            f"{path}: torch.load(weights_only=True) refuses it: {first_line} Get the file again, "
            "from a source that you trust."
        ) from error
    is_flat = isinstance(loaded, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in loaded.items()
    )
    if not is_flat:
        raise FormatError(
            f"{path}: does not map names to tensors; save the model's state_dict() alone."
        )
    return {name: _to_numpy(tensor, torch) for name, tensor in loaded.items()}


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no name for it.
        bits: np.ndarray = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: np.ndarray = tensor.numpy()
    return array


def rotary_table(config: ModelConfig) -> np.ndarray:
    """Upstream's buffer `freqs_cis`: cosine and sine by position and pair, float32
    [1, block_size, 1, head_dim / 2, 2]."""
    head_dim, positions = config.head_dim(config.width), config.positions
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(positions.rotary_base) ** exponents
    places = np.arange(config.max_length, dtype=np.float32) / np.float32(positions.scaling.factor)
    angles = np.outer(places, frequencies)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)[None, :, None]


# ------------------------------------------------------------------------------
# config.json.


def _named(names: Mapping[str, str], ours: str) -> str:
    """Upstream's name, or the first one, whose difference `config_to` then reports."""
    return next((theirs for theirs, mine in names.items() if mine == ours), next(iter(names)))


def _rope_settings(positions: PositionConfig) -> dict[str, Any]:
    base, factor = positions.rotary_base, positions.scaling.factor
    if positions.scheme != "rotary":
        return {**_ROPE, "use_rope": False}
    return {
        "use_rope": True,
        "rope_condense_ratio": int(factor) if factor.is_integer() else factor,
        "rope_base": int(base) if base.is_integer() else base,
    }


def _known_rotation(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = values.get("rope_settings") or {}
    if not isinstance(given, Mapping):
        raise FormatError(f"{where}: rope_settings is {given!r}; it must be a JSON object.")
    known = {**_ROPE, **given}
    kinds = {"use_rope": bool, "rope_condense_ratio": float, "rope_base": float}
    for key, kind in kinds.items():
        if not is_a(known[key], kind):
            raise FormatError(
                f"{where}: rope_settings.{key} is {known[key]!r}; it must be of type "
                f"{kind.__name__}."
            )
    return {key: known[key] for key in kinds}


def _resolve(known: dict[str, Any]) -> None:
    """Fills in what upstream's config class derives."""
    heads, multiple = known["num_attention_heads"], max(1, known["padding_multiple"])
    resolved = {
        "padded_vocab_size": -(-known["vocab_size"] // multiple) * multiple,
        "num_key_value_heads": heads,
        "recurrent_num_attention_heads": heads,
        "intermediate_size": 4 * known["n_embd"],
    }
    for key, value in resolved.items():
        if known[key] is None:
            known[key] = value


def _check_choices(known: Mapping[str, Any], where: str) -> None:
    strategies = (*_TAKASE_STD, *_OTHER_STD)
    for key, choices in (
        ("norm_class_name", tuple(_NORMS)),
        ("mlp_class_name", tuple(_MLPS)),
        ("nonlin_name", tuple(_ACTIVATIONS)),
        ("injection_type", tuple(_ADAPTERS)),
        ("state_init", tuple(_STATE_INIT)),
        ("init_strategy", strategies),
        ("recurrent_iteration_method", tuple(_DRAW_PER)),
    ):
        if known[key] not in choices:
            raise FormatError(f"{where}: {key} is {known[key]!r}; supported: {', '.join(choices)}.")


def _check_core(known: Mapping[str, Any], where: str) -> None:
    """The core has the shapes of the other layers, with as many key/value heads as queries."""
    for key, other in (
        ("recurrent_embedding_dimension", "n_embd"),
        ("recurrent_intermediation_embedding_dimension", "intermediate_size"),
        ("recurrent_num_attention_heads", "num_attention_heads"),
        ("num_key_value_heads", "num_attention_heads"),
    ):
        if known[key] != known[other]:
            grouped = "Parcae's core has no grouped heads, and "
            raise FormatError(
                f"{where}: {key} is {known[key]!r}, but {other} is {known[other]!r}; "
                f"{grouped if key == 'num_key_value_heads' else ''}all layers have one shape here, "
                "so the two must be equal."
            )
    if known["n_layers_in_recurrent_block"] < 1:
        raise FormatError(f"{where}: n_layers_in_recurrent_block is 0; Parcae has a core.")


def _numbers(config: ModelConfig) -> dict[str, int]:
    """What decides which layers have value embeddings, under the names of config.json."""
    return {
        "n_layers_in_prelude": config.prelude_layers,
        "n_layers_in_recurrent_block": config.core_layers,
        "n_layers_in_coda": config.coda_layers,
        "mean_recurrence": config.recurrence.mean_steps,
        "mean_backprop_depth": config.recurrence.backprop_depth,
    }


def _value_layers(known: Mapping[str, Any]) -> tuple[set[int], set[int]]:
    """Layers with a gate and layers with value embeddings, by their place among all layers.

    Upstream gives both to every second layer, but counts twice: for the embeddings through prelude,
    core and coda, and for gates with the coda behind all iterations of the core, up to a number of
    layers that is the core's in the gradient iterations. A layer adds value embeddings if it has
    both.
    """
    prelude, core = known["n_layers_in_prelude"], known["n_layers_in_recurrent_block"]
    layers = prelude + core + known["n_layers_in_coda"]
    last_gated = core * known["mean_backprop_depth"] - 1
    shift = core * known["mean_recurrence"] - core
    numbers = {place: place + (shift if place >= prelude + core else 0) for place in range(layers)}
    gated = {place for place, number in numbers.items() if (number - last_gated) % 2 == 0}
    return gated, {place for place in range(layers) if (layers - 1 - place) % 2 == 0}


def _build(known: Mapping[str, Any]) -> ModelConfig:
    gated, embedded = _value_layers(known)
    layers = tuple(sorted(gated & embedded))
    norm = _NORMS[known["norm_class_name"]]
    return ModelConfig(
        vocab_size=known["padded_vocab_size"],
        width=known["n_embd"],
        max_length=known["block_size"],
        prelude_layers=known["n_layers_in_prelude"],
        core_layers=known["n_layers_in_recurrent_block"],
        coda_layers=known["n_layers_in_coda"],
        tie_embeddings=known["tie_embeddings"],
        scale_embeddings=known["init_strategy"] == "takase",
        logit_softcap=known["logit_softcap"],
        attention=_attention(known),
        value_embedding=ValueEmbeddingConfig(layers) if layers else ValueEmbeddingConfig(),
        positions=_positions(known),
        norm=NormConfig(kind=norm, eps=known["norm_eps"], bias=norm == "layernorm"),
        mlp=MlpConfig(
            kind=_MLPS[known["mlp_class_name"]],
            hidden_width=known["intermediate_size"],
            activation=_ACTIVATIONS[known["nonlin_name"]],
        ),
        init=_init(known),
        recurrence=_recurrence(known),
    )


def _attention(known: Mapping[str, Any]) -> AttentionConfig:
    normed: dict[str, Any] = {}
    if known["qk_norm"]:
        normed = {
            "qk_norm": True,
            "qk_norm_scale": False,
            "qk_norm_after_rotary": True,
            "qk_norm_eps": _QK_NORM_EPS,
        }
    return AttentionConfig(
        num_heads=known["num_attention_heads"], qk_bias=known["qk_bias"], **normed
    )


def _positions(known: Mapping[str, Any]) -> PositionConfig:
    if not known["use_rope"]:
        return PositionConfig(scheme="none")
    ratio = float(known["rope_condense_ratio"])
    return PositionConfig(
        rotary_base=float(known["rope_base"]),
        rotary_convention="interleaved",
        scaling=RotaryScalingConfig() if ratio == 1 else RotaryScalingConfig("linear", ratio),
    )


def _init(known: Mapping[str, Any]) -> InitConfig:
    strategy = known["init_strategy"]
    std = _OTHER_STD.get(strategy)
    if std is not None:
        return InitConfig("scaled", std(known["n_embd"]))
    return InitConfig(zero_outputs=strategy == _ZERO_OUTPUTS)


def _strategy(config: ModelConfig) -> str:
    """The init_strategy that `_init` reads as the model's, or the first that scales embeddings as
    the model does."""
    if config.scale_embeddings:
        return "takase"
    if config.init.scheme != "takase":
        for strategy, std in _OTHER_STD.items():
            if math.isclose(std(config.width), config.init.std, rel_tol=1e-12):
                return strategy
    return _ZERO_OUTPUTS if config.init.zero_outputs else "scaled"


def _recurrence(known: Mapping[str, Any]) -> RecurrenceConfig:
    mean, depth = known["mean_recurrence"], known["mean_backprop_depth"]
    return RecurrenceConfig(
        adapter=_ADAPTERS[known["injection_type"]],
        injection_norm=known["prelude_norm"],
        output_norm=False,
        readout_matrix=True,
        state_init=_STATE_INIT[known["state_init"]],
        mean_steps=mean,
        backprop_depth=depth,
        sampling=_SAMPLING.get(known["sampling_scheme"], "poisson"),
        max_steps=max(RecurrenceConfig().max_steps, _MAX_STEPS_PER_MEAN * mean, depth),
        draw_per=_DRAW_PER[known["recurrent_iteration_method"]],
    )


# ------------------------------------------------------------------------------
# Tensors.


def _layers(config: ModelConfig) -> Iterator[tuple[str, int, str]]:
    """Stack, place in it, and upstream's name of each layer, from the first to the last."""
    names = {"prelude": "prelude", "core": "core_block", "coda": "coda"}
    for stack, theirs in names.items():
        for layer in range(getattr(config, f"{stack}_layers")):
            yield stack, layer, f"transformer.{theirs}.{layer}"


def _layer(ours: str, theirs: str, config: ModelConfig) -> list[Link]:
    width, hidden = config.width, config.mlp.hidden_width
    heads, head_dim = config.attention.num_heads, config.head_dim(width)
    attention, mlp = f"{ours}/attention", f"{ours}/mlp"
    query, key, value = (f"{theirs}.attn.c_{part}.weight" for part in "qkv")
    names = (query, key, value)
    links = [
        separate_qkv(f"{attention}/qkv", names, heads, heads, (head_dim, width)),
        attention_output(
            f"{attention}/output", f"{theirs}.attn.c_proj.weight", heads, head_dim, width
        ),
        transposed(f"{mlp}/down", f"{theirs}.mlp.proj.weight", (width, hidden)),
        *_norm(f"{ours}/attention_norm_in", f"{theirs}.norm_1", config),
        *_norm(f"{ours}/mlp_norm_in", f"{theirs}.norm_2", config),
    ]
    up = f"{theirs}.mlp.fc.weight"
    if config.mlp.kind == "gated":
        links.append(fused_gate(f"{mlp}/up", up, hidden, width))
    else:
        theirs_up, convert = {up: (hidden, width)}, lambda x: (x.T[:, None],)
        links.append(Link((f"{mlp}/up",), theirs_up, convert, lambda x: (x[:, 0].T,)))
    if config.attention.qk_bias:
        links.append(stacked_qk_bias(attention, f"{theirs}.attn.qk_bias", heads, head_dim))
    return links


def _norm(ours: str, theirs: str, config: ModelConfig) -> list[Link]:
    links = [same(f"{ours}/scale", f"{theirs}.weight", (config.width,))]
    if config.norm.bias:
        links.append(same(f"{ours}/bias", f"{theirs}.bias", (config.width,)))
    return links


def _adapter(config: ModelConfig) -> list[Link]:
    width, ours = config.width, "core/adapter"
    match config.recurrence.adapter:
        case "diagonal":
            return [
                same(f"{ours}/a_log", f"{_ADAPTER}.A_log", (width,)),
                same(f"{ours}/dt_bias", f"{_ADAPTER}.dt_bias", (width,)),
                transposed(f"{ours}/b_matrix", f"{_ADAPTER}.B", (width, width)),
            ]
        case "linear":
            return [linear_adapter(ours, f"{_ADAPTER}.adapter.weight", width)]
    return []


def _table_complaint(table: np.ndarray, config: ModelConfig) -> str | None:
    wanted = rotary_table(config)
    is_equal = table.shape == wanted.shape and np.allclose(
        table.astype(np.float32), wanted, rtol=0, atol=_TABLE_TOLERANCE
    )
    if is_equal or config.positions.scheme != "rotary":
        return None
    return (
        f"is {table.shape} and not the table of rotations {wanted.shape} that rope_settings, "
        "block_size and the heads in config.json make; correct them there."
    )
