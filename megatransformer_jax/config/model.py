"""The architecture: frozen dataclasses that own its names, types, defaults and checks."""

import dataclasses

from megatransformer_jax.config.option import ConfigError, check_options, option, section

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu_squared", "silu", "sigmoid", "tanh", "identity")


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
        if self.scheme == "rotary":
            return
        for name in ("rotary_base", "rotary_convention"):
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ConfigError(
                    name,
                    f"{getattr(self, name)!r} would be ignored with scheme={self.scheme!r}; "
                    f"set scheme='rotary' or leave it at {default!r}.",
                )


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Which normalisation, and where in a block."""

    kind: str = option("rmsnorm", "Normalisation layer.", choices=("rmsnorm", "layernorm"))
    placement: str = option(
        "pre",
        "pre: x + f(norm(x)). post: norm(x + f(x)). sandwich: norm(x + f(norm(x))), Huginn's. "
        "peri: x + norm(f(norm(x))), Gemma 2's.",
        choices=("pre", "post", "sandwich", "peri"),
    )
    eps: float = option(1e-6, "Added to the variance.", above=0)
    bias: bool = option(False, "Adds a bias (layernorm only).")

    def __post_init__(self) -> None:
        check_options(self)
        if self.bias and self.kind != "layernorm":
            raise ConfigError(
                "bias", f"True needs kind='layernorm', not {self.kind!r}; set bias=False."
            )


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """Feed-forward layer. Gated with sigmoid is GLU, relu ReGLU, gelu GEGLU, silu SwiGLU."""

    kind: str = option(
        "gated",
        "mlp: down(act(up(x))). gated: down(act(gate(x)) * up(x)) (arXiv 2002.05202).",
        choices=("mlp", "gated"),
    )
    hidden_width: int = option(704, "Hidden width (F).", minimum=1)
    activation: str = option("silu", "Nonlinearity (of the gate, if gated).", choices=ACTIVATIONS)
    bias: bool = option(False, "Adds biases to its projections.")
    dropout_rate: float = option(0.0, "Dropout on the hidden layer.", minimum=0, below=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Weight initialisation."""

    scheme: str = option(
        "takase",
        "normal: std for all. scaled: normal, with residual outputs divided by sqrt(2 * depth) "
        "(GPT-2). takase: std sqrt(2 / (5 D)), residual outputs divided by sqrt(2 * depth) "
        "(Huginn, arXiv 2312.16903). depth counts the layers passed through at the mean depth.",
        choices=("normal", "scaled", "takase"),
    )
    std: float = option(0.02, "Standard deviation for normal and scaled.", above=0)

    def __post_init__(self) -> None:
        check_options(self)
        default = type(self).__dataclass_fields__["std"].default
        if self.scheme == "takase" and self.std != default:
            raise ConfigError(
                "std",
                f"{self.std!r} would be ignored with scheme='takase', which computes its own; "
                f"use scheme='normal' or 'scaled', or leave std at {default!r}.",
            )


@dataclasses.dataclass(frozen=True)
class RecurrenceConfig:
    """How the core is iterated: injection, initial state, and how deep training goes."""

    adapter: str = option(
        "linear",
        "Feeds the injected prelude output e into the state s. linear: W [s; e]. sum: s + e. "
        "gate: s * e. diagonal: exp(-dt A) s + dt B e, stable by design (arXiv 2604.12946).",
        choices=("linear", "sum", "gate", "diagonal"),
    )
    zero_order_hold: bool = option(
        False,
        "diagonal only: exact discretisation, (1 - exp(-dt A)) / A instead of dt on the input.",
    )
    core_width: int | None = option(
        None, "Width of the core if it differs from the model's. None: the same.", minimum=1
    )
    injection_norm: bool = option(False, "Normalises the prelude's output before injection.")
    iteration_norm: bool = option(False, "Normalises the core's output after every iteration.")
    state_init: str = option(
        "like_init",
        "First state. like_init: normal cut at 3 std with the embedding's std and scale. normal: "
        "std 1. embed: std 1/sqrt(D). unit: normal with mean 0 and std 1 per position. zero. "
        "none: the injected embedding itself.",
        choices=("like_init", "normal", "embed", "unit", "zero", "none"),
    )
    mean_steps: int = option(8, "Mean number of iterations in training (r).", minimum=1)
    backprop_depth: int = option(
        4, "Last iterations that gradients flow through (k); the rest run without.", minimum=1
    )
    sampling: str = option(
        "lognormal_poisson",
        "Distribution of the number of iterations, all with mean about mean_steps. "
        "lognormal_poisson: Huginn's 'filling', Poisson(exp(normal)) + 1. fixed. "
        "uniform: 1 .. 2 * mean_steps - 1. poisson: Poisson(mean_steps - 1) + 1. "
        "truncated_poisson: Poisson(mean_steps), redrawn outside 1 .. max_steps. geometric.",
        choices=(
            "lognormal_poisson",
            "fixed",
            "uniform",
            "poisson",
            "truncated_poisson",
            "geometric",
        ),
    )
    sampling_sigma: float = option(0.5, "Spread of the log-normal rate.", above=0)
    max_steps: int = option(64, "No draw is larger than this.", minimum=1)
    draw_per: str = option(
        "batch",
        "One draw for all, for each sequence, or for each token.",
        choices=("batch", "sequence", "token"),
    )
    ramp: str = option(
        "none",
        "Curriculum: the mean grows from ramp_from to mean_steps over ramp_steps. linear, or "
        "one_minus_sqrt: 1 - sqrt(1 - t), slow at first.",
        choices=("none", "linear", "one_minus_sqrt"),
    )
    ramp_steps: int = option(0, "Optimiser steps that the ramp takes.", minimum=0)
    ramp_from: int = option(1, "Mean number of iterations at step 0 of the ramp.", minimum=1)
    unroll: int = option(
        1,
        "Gradient iterations laid out per loop turn; more compiles longer, may run faster.",
        minimum=1,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.mean_steps > self.max_steps:
            raise ConfigError(
                "mean_steps",
                f"{self.mean_steps} exceeds max_steps={self.max_steps}; lower it or raise max_steps.",
            )
        if self.zero_order_hold and self.adapter != "diagonal":
            raise ConfigError(
                "zero_order_hold",
                f"True needs adapter='diagonal', not {self.adapter!r}; set it to False.",
            )
        if (self.ramp == "none") != (self.ramp_steps == 0):
            raise ConfigError(
                "ramp_steps",
                f"{self.ramp_steps} does not go with ramp={self.ramp!r}; a ramp needs "
                f"ramp_steps >= 1, and ramp='none' needs ramp_steps=0.",
            )
        if self.ramp_from > self.mean_steps:
            raise ConfigError(
                "ramp_from", f"{self.ramp_from} exceeds mean_steps={self.mean_steps}; lower it."
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole text model: embedding, prelude, recurrent core, coda, head."""

    vocab_size: int = option(
        2048, "Rows of embedding and head (V); at least the tokenizer's size.", minimum=2
    )
    width: int = option(256, "Model width (D).", minimum=1)
    max_length: int = option(
        1024, "Longest sequence: capacity of learned positions, and checked on input.", minimum=1
    )
    prelude_layers: int = option(1, "Layers before the core.", minimum=0)
    core_layers: int = option(
        2, "Layers of one core iteration. 0: a plain causal LM without recurrence.", minimum=0
    )
    coda_layers: int = option(1, "Layers after the core.", minimum=0)
    tie_embeddings: bool = option(True, "The head reuses the token embedding.")
    scale_embeddings: bool = option(False, "Multiplies token embeddings by sqrt(D).")
    head_bias: bool = option(False, "Adds a bias to the head's logits.")
    embedding_dropout_rate: float = option(0.0, "Dropout on embeddings.", minimum=0, below=1)
    residual_dropout_rate: float = option(
        0.0, "Dropout on what a layer adds to the residual stream.", minimum=0, below=1
    )
    logit_softcap: float | None = option(
        None, "Bounds output logits smoothly: cap * tanh(logit / cap); Gemma 2 uses 30.", above=0
    )
    remat: str = option(
        "none",
        "What is recomputed in the backward pass. none: nothing. full: each core iteration and "
        "each other layer. dots: the same but matrix products are kept.",
        choices=("none", "full", "dots"),
    )
    attention: AttentionConfig = section(AttentionConfig, "Self-attention.")
    positions: PositionConfig = section(PositionConfig, "Position scheme.")
    norm: NormConfig = section(NormConfig, "Normalisation.")
    mlp: MlpConfig = section(MlpConfig, "Feed-forward layer.")
    init: InitConfig = section(InitConfig, "Initialisation.")
    recurrence: RecurrenceConfig = section(RecurrenceConfig, "Depth recurrence.")

    def __post_init__(self) -> None:
        check_options(self)
        for name, width in (("width", self.width), ("recurrence.core_width", self.core_width)):
            if self.attention.head_dim is None and width % self.attention.num_heads:
                raise ConfigError(
                    name,
                    f"{width} is not divisible by attention.num_heads="
                    f"{self.attention.num_heads}; change either, or set attention.head_dim.",
                )
            if self.positions.scheme == "rotary" and self.head_dim(width) % 2:
                raise ConfigError(
                    "attention.head_dim",
                    f"{self.head_dim(width)} is odd, but rotary positions rotate pairs; "
                    f"make {name} / num_heads even or choose another positions.scheme.",
                )
        if self.positions.scheme == "sinusoidal" and self.width % 2:
            raise ConfigError(
                "width", f"{self.width} is odd; sinusoidal positions need an even width."
            )
        if self.prelude_layers + self.core_layers + self.coda_layers == 0:
            raise ConfigError("prelude_layers", "there are no layers at all; give at least one.")
        if not self.is_recurrent and self.recurrence != RecurrenceConfig():
            raise ConfigError(
                "recurrence",
                "its options would be ignored with core_layers=0; leave them at their defaults "
                "or give the core at least one layer.",
            )
        if self.tie_embeddings and self.head_bias:
            raise ConfigError("head_bias", "True needs tie_embeddings=False; set head_bias=False.")

    @property
    def is_recurrent(self) -> bool:
        """Whether there is a core to iterate."""
        return self.core_layers > 0

    @property
    def core_width(self) -> int:
        """Width of the core after resolving None."""
        own = self.recurrence.core_width
        return self.width if own is None else own

    def head_dim(self, width: int) -> int:
        """Width of one attention head in a layer of this width."""
        own = self.attention.head_dim
        return width // self.attention.num_heads if own is None else own
