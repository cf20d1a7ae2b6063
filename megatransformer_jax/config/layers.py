"""What a layer is made of: attention and positions, PEER experts, weights that layers share."""

import dataclasses
import math

from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
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
    qk_norm: bool = option(False, "RMS-normalises queries and keys per head before rotation.")
    logit_softcap: float | None = option(
        None,
        "Bounds attention logits smoothly: cap * tanh(logit / cap). Gemma 2 uses 50. Default "
        "(None): off.",
        above=0,
    )
    window: int | None = option(
        None,
        "Sliding window: a query sees itself and the window-1 positions before it. Default "
        "(None): all.",
        minimum=1,
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

    @property
    def kv_heads(self) -> int:
        """Key/value heads after resolving None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


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

    def __post_init__(self) -> None:
        check_options(self)

    @rule("rotary_base", "rotary_convention")
    def _rotary_options_need_rotary(self) -> None:
        """Only with scheme='rotary'."""
        if self.scheme != "rotary":
            require_defaults(
                self,
                ("rotary_base", "rotary_convention"),
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
