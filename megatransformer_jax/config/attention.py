"""Attention, and how it knows where a token is, as frozen dataclasses."""

import dataclasses

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
        None, "Key/value heads (K); must divide num_heads. None: as many as query heads.", minimum=1
    )
    head_dim: int | None = option(
        None, "Width of one head (H). None: width / num_heads, which must be whole.", minimum=1
    )
    qkv_bias: bool = option(False, "Adds a bias to the query, key and value projections.")
    output_bias: bool = option(False, "Adds a bias to the output projection.")
    qk_bias: bool = option(
        False, "Adds a learned vector per head to queries and keys before rotation (Huginn)."
    )
    qk_norm: bool = option(False, "RMS-normalises queries and keys per head before rotation.")
    logit_softcap: float | None = option(
        None,
        "Bounds attention logits smoothly: cap * tanh(logit / cap). Gemma 2 uses 50; None: off.",
        above=0,
    )
    window: int | None = option(
        None,
        "Sliding window: a query sees itself and the window-1 positions before it. None: all.",
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
