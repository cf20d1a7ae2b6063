"""What a layer is made of: attention and positions, PEER experts, weights that layers share."""

import dataclasses
import math

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
    section,
)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Multi-head or grouped-query self-attention."""

    num_heads: int = option(4, "Query heads (N).", minimum=1)
    num_kv_heads: int | None = option(
        None,
        "Key/value heads (K); must divide num_heads. Default (None): as many as query heads.",
        minimum=1,
    )
    head_dim: int | None = option(
        None,
        "Width of one head (H). Default (None): width / num_heads, which must be whole.",
        minimum=1,
    )
    qkv_bias: bool = option(False, "Adds a bias to the query, key and value projections.")
    output_bias: bool = option(False, "Adds a bias to the output projection.")
    qk_bias: bool = option(
        False, "Adds a learned vector per head to queries and keys before rotation (Huginn)."
    )
    qk_norm: bool = option(
        False, "RMS-normalises queries and keys; by default per head, before rotation (Qwen 3)."
    )
    qk_norm_span: str = option(
        "head",
        "Channels that qk_norm normalises together. head: those of one head, with one scale for "
        "all heads. width: those of all heads, each with its own scale (OLMo 2).",
        choices=("head", "width"),
    )
    qk_norm_scale: bool = option(
        True, "Multiplies by a learned scale after qk_norm. False: no parameters (Parcae)."
    )
    qk_norm_after_rotary: bool = option(
        False, "Applies qk_norm after rotation, and after qk_bias, instead of before both (Parcae)."
    )
    qk_norm_eps: float | None = option(
        None, "Added to the variance in qk_norm. Default (None): norm.eps.", above=0
    )
    logit_softcap: float | None = option(
        None,
        "Bounds attention logits smoothly: cap * tanh(logit / cap). Gemma 2 uses 50. Default "
        "(None): off.",
        above=0,
    )
    is_causal: bool = option(
        True,
        "A token sees itself and those before it. False: also those after it, for problems whose "
        "answers stand under them, such as puzzles. Such a model answers whole rows and cannot "
        "continue a prompt.",
    )
    window: int | None = option(
        None,
        "Sliding window: a query sees itself and the window-1 positions before it. Default "
        "(None): all.",
        minimum=1,
    )
    prelude_windows: tuple[int, ...] = option(
        (),
        "Sliding window of each prelude layer, 0 for none. A shorter list repeats: (4096, 0) makes "
        "every second layer see everything. Default (): `window` in all layers.",
        minimum=0,
    )
    core_windows: tuple[int, ...] = option(
        (), "The same for the core, in every iteration. Default (): `window`.", minimum=0
    )
    coda_windows: tuple[int, ...] = option(
        (), "The same for the coda. Default (): `window`.", minimum=0
    )
    dropout_rate: float = option(0.0, "Dropout on attention weights.", minimum=0, below=1)
    kernel: str = option(
        "auto",
        "Attention implementation. auto: cuDNN on GPU and splash on TPU where they support the "
        "options, XLA elsewhere; a named one that cannot serve the options is an error.",
        choices=("auto", "xla", "cudnn", "splash"),
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("num_kv_heads")
    def _kv_heads_divide_heads(self) -> None:
        """Divides num_heads."""
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                "num_kv_heads",
                f"{self.kv_heads} does not divide num_heads={self.num_heads}; "
                f"use a divisor of {self.num_heads}.",
            )

    @rule("window", "prelude_windows", "core_windows", "coda_windows")
    def _windows_look_back(self) -> None:
        """Only with is_causal=True."""
        if not self.is_causal:
            names = ("window", "prelude_windows", "core_windows", "coda_windows")
            require_defaults(self, names, "with is_causal=False", "set is_causal=True")

    @rule("qk_norm_span", "qk_norm_scale", "qk_norm_after_rotary", "qk_norm_eps")
    def _norm_options_need_the_norm(self) -> None:
        """Only with qk_norm=True."""
        if not self.qk_norm:
            names = ("qk_norm_span", "qk_norm_scale", "qk_norm_after_rotary", "qk_norm_eps")
            require_defaults(self, names, "with qk_norm=False", "set qk_norm=True")

    @property
    def kv_heads(self) -> int:
        """Key/value heads after resolving None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class ValueEmbeddingConfig:
    """Embeddings of the tokens that are added to the values of some layers' attention.

    Each such layer has its own table, and adds 2 sigmoid(gate(x)) times the token's row to
    its values, with a number per key/value head from the first channels of its input x. As in
    nanochat and Parcae (arXiv 2604.12946).
    """

    layers: tuple[int, ...] = option(
        (),
        "Layers with value embeddings, counted from 0 through prelude, core and coda; such as "
        "(1, 3, 5). A core layer adds the same rows in every iteration. Default (): none.",
        minimum=0,
    )
    gate_channels: int = option(
        32, "Channels of a layer's input, from the first, that its gate reads.", minimum=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("layers")
    def _layers_are_in_order(self) -> None:
        """Ascending, each once."""
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(
                "layers",
                f"{self.layers!r} is not in order; write {tuple(sorted(set(self.layers)))}.",
            )

    @rule("gate_channels")
    def _gates_need_layers(self) -> None:
        """Only with layers."""
        if not self.layers:
            require_defaults(self, ("gate_channels",), "with layers=()", "name some layers")


_SCALING_OPTIONS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_length",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
}


@dataclasses.dataclass(frozen=True)
class RotaryScalingConfig:
    """Slower rotations, so that a model reads longer texts than it was trained on.

    As transformers computes them for the folders of Llama, Qwen and others.
    """

    kind: str = option(
        "none",
        "none: plain rotary positions. linear: all frequencies divided by factor "
        "(arXiv 2306.15595). llama3: only low ones, with a smooth transition (Llama 3.1). yarn: "
        "the same with other bounds, and attention is sharpened (arXiv 2309.00071).",
        choices=tuple(_SCALING_OPTIONS),
    )
    factor: float = option(
        1.0, "What low frequencies are divided by: the new length over the old.", minimum=1
    )
    original_length: int = option(
        8192, "Tokens of the texts that the plain frequencies were trained on.", minimum=1
    )
    low_freq_factor: float = option(
        1.0,
        "llama3: wavelengths above original_length / low_freq_factor are stretched fully.",
        above=0,
    )
    high_freq_factor: float = option(
        4.0,
        "llama3: wavelengths below original_length / high_freq_factor stay as they are.",
        above=0,
    )
    beta_fast: float = option(
        32.0, "yarn: channels that turn more often in original_length stay as they are.", above=0
    )
    beta_slow: float = option(
        1.0, "yarn: channels that turn less often in original_length are stretched fully.", above=0
    )
    attention_factor: float | None = option(
        None,
        "yarn: multiplies rotated queries and keys. Default (None): 0.1 ln(factor) + 1.",
        above=0,
    )
    truncate: bool = option(
        True, "yarn: rounds the bounds between stretched and other channels to whole channels."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("kind", *_SCALING_OPTIONS["llama3"], *_SCALING_OPTIONS["yarn"][2:])
    def _scaling_is_of_the_kind(self) -> None:
        """Only with a kind that reads it; other kinds than 'none' need factor above 1."""
        read = _SCALING_OPTIONS[self.kind]
        names = [field.name for field in dataclasses.fields(self) if field.name != "kind"]
        unread = [name for name in names if name not in read]
        require_defaults(self, unread, f"with kind={self.kind!r}", "choose a kind that reads it")
        if read and self.factor == 1:
            raise ConfigError(
                "factor", f"1.0 changes nothing with kind={self.kind!r}; set it above 1."
            )

    @rule("low_freq_factor", "high_freq_factor", "beta_slow", "beta_fast")
    def _bounds_are_in_order(self) -> None:
        """low_freq_factor is below high_freq_factor, and beta_slow below beta_fast."""
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ConfigError(
                    low,
                    f"{getattr(self, low)} is not below {high}={getattr(self, high)}; lower it, or "
                    f"raise {high}.",
                )


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """How the model knows where a token is. Exactly one scheme is used."""

    scheme: str = option(
        "rotary",
        "rotary and alibi act in attention, learned and sinusoidal add to the embedding.",
        choices=("rotary", "alibi", "learned", "sinusoidal", "none"),
    )
    rotary_base: float = option(10_000.0, "Base of the rotary wavelengths.", above=1)
    rotary_convention: str = option(
        "half",
        "Which channels form a rotated pair: half (i, i + H/2) as Llama, interleaved (2i, 2i+1) "
        "as Huginn and GPT-J.",
        choices=("half", "interleaved"),
    )
    scaling: RotaryScalingConfig = section(RotaryScalingConfig, "Rotary positions, stretched.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("rotary_base", "rotary_convention", "scaling")
    def _rotary_options_need_rotary(self) -> None:
        """Only with scheme='rotary'."""
        if self.scheme != "rotary":
            require_defaults(
                self,
                ("rotary_base", "rotary_convention", "scaling"),
                f"with scheme={self.scheme!r}",
                "set scheme='rotary'",
            )


# ------------------------------------------------------------------------------
# PEER: a feed-forward layer of very many experts of one neuron each.


@dataclasses.dataclass(frozen=True)
class PeerConfig:
    """Parameter-efficient expert retrieval (arXiv 2407.04153), for mlp.kind='peer'.

    A token's cost depends on num_heads and top_k and on the square root of num_experts alone.
    """

    num_experts: int = option(
        16_384, "Experts, each of one neuron; the square of a whole number.", minimum=1
    )
    num_heads: int = option(
        8, "Queries per token; each retrieves its own experts from the shared pool.", minimum=1
    )
    top_k: int = option(
        16, "Experts per query. A token's active neurons are num_heads * top_k.", minimum=1
    )
    key_dim: int = option(
        128, "Width of a query. Each of its halves is compared with half keys.", minimum=2
    )
    query_norm: str = option(
        "batch",
        "Normalisation of queries, with a learned scale and bias. batch: of each channel over all "
        "tokens of the batch, as in the paper; evaluation uses running statistics. layer: over "
        "the channels of a query.",
        choices=("batch", "layer", "none"),
    )
    query_momentum: float = option(
        0.9,
        "Decay of the running statistics of query_norm='batch' per training step.",
        minimum=0,
        below=1,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def num_keys(self) -> int:
        """Half keys in each of the two sets: the square root of `num_experts`."""
        return math.isqrt(self.num_experts)

    @rule("num_experts")
    def _experts_are_a_square(self) -> None:
        """The square of a whole number."""
        if self.num_keys**2 != self.num_experts:
            raise ConfigError(
                "num_experts",
                f"{self.num_experts} is not the square of a whole number, which product keys need; "
                f"use {self.num_keys**2} or {(self.num_keys + 1) ** 2}.",
            )

    @rule("top_k")
    def _top_k_fits_the_half_keys(self) -> None:
        """At most the square root of num_experts."""
        if self.top_k > self.num_keys:
            raise ConfigError(
                "top_k",
                f"{self.top_k} is more than the {self.num_keys} half keys of num_experts="
                f"{self.num_experts}; use at most {self.num_keys}, or more experts.",
            )

    @rule("key_dim")
    def _queries_have_halves(self) -> None:
        """Even."""
        if self.key_dim % 2:
            raise ConfigError(
                "key_dim", f"{self.key_dim} has no halves; use {self.key_dim + 1}, an even number."
            )

    @rule("query_momentum")
    def _momentum_needs_batch_norm(self) -> None:
        """Only with query_norm='batch'."""
        if self.query_norm != "batch":
            require_defaults(
                self,
                ("query_momentum",),
                f"with query_norm={self.query_norm!r}",
                "set query_norm='batch'",
            )


# ------------------------------------------------------------------------------
# Layers of a stack that share their weights.

SHARING_SCHEMES = ("none", "sequence", "cycle", "cycle_rev")
_UNIQUE = ("prelude_unique", "core_unique", "coda_unique")


@dataclasses.dataclass(frozen=True)
class SharingConfig:
    """Which layers of prelude, core and coda have the same weights (arXiv 2104.06022)."""

    scheme: str = option(
        "none",
        "Which layers share weights; for 6 layers of which 3 are distinct: sequence: 0 0 1 1 2 2. "
        "cycle: 0 1 2 0 1 2. cycle_rev: 0 1 2 2 1 0 (cycle with the last round reversed).",
        choices=SHARING_SCHEMES,
    )
    prelude_unique: int | None = option(
        None,
        "Number of distinct layers in the prelude. Default (None): no layers share weights.",
        minimum=1,
    )
    core_unique: int | None = option(
        None,
        "Number of distinct layers per core iteration. Default (None): no layers share weights.",
        minimum=1,
    )
    coda_unique: int | None = option(
        None,
        "Number of distinct layers in the coda. Default (None): no layers share weights.",
        minimum=1,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("scheme", *_UNIQUE)
    def _scheme_and_counts_go_together(self) -> None:
        """A scheme needs one of prelude_unique, core_unique and coda_unique, and they need it."""
        if self.scheme == "none":
            require_defaults(self, _UNIQUE, "with scheme='none'", "choose a scheme")
        elif all(getattr(self, name) is None for name in _UNIQUE):
            raise ConfigError(
                "scheme",
                f"{self.scheme!r} shares nothing as long as all layers are unique; set one of "
                f"{', '.join(_UNIQUE)}, or scheme='none'.",
            )
