"""The architecture: frozen dataclasses that own its names, types, defaults and checks."""

import dataclasses

from megatransformer_jax.config.audio import AudioConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.layers import (
    AttentionConfig,
    PeerConfig,
    PositionConfig,
    SharingConfig,
    ValueEmbeddingConfig,
)
from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    default_of,
    option,
    require_defaults,
    rule,
    section,
)
from megatransformer_jax.config.recurrence import ExitGateConfig, RecurrenceConfig

STACKS = ("prelude", "core", "coda")
ACTIVATIONS = (
    "gelu",
    "gelu_tanh",
    "relu",
    "relu_squared",
    "relu_squared_half",
    "silu",
    "sigmoid",
    "tanh",
    "identity",
)


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Which normalisation, and where in a block."""

    kind: str = option("rmsnorm", "Normalisation layer.", choices=("rmsnorm", "layernorm"))
    placement: str = option(
        "pre",
        "pre: x + f(norm(x)). post: norm(x + f(x)). sandwich: norm(x + f(norm(x))), Huginn's. "
        "peri: x + norm(f(norm(x))), Gemma 2's. output: x + norm(f(x)), OLMo 2's. none: x + f(x), "
        "as in ReZero.",
        choices=("pre", "post", "sandwich", "peri", "output", "none"),
    )
    eps: float = option(1e-6, "Added to the variance.", above=0)
    bias: bool = option(False, "Adds a bias (layernorm only).")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("bias")
    def _bias_needs_layernorm(self) -> None:
        """True only with kind='layernorm'."""
        if self.bias and self.kind != "layernorm":
            raise ConfigError(
                "bias", f"True needs kind='layernorm', not {self.kind!r}; set bias=False."
            )


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """Feed-forward layer. Gated with sigmoid is GLU, relu ReGLU, gelu GEGLU, silu SwiGLU."""

    kind: str = option(
        "gated",
        "mlp: down(act(up(x))). gated: down(act(gate(x)) * up(x)) (arXiv 2002.05202). peer: a few "
        "of very many experts of one neuron, retrieved by product keys (arXiv 2407.04153).",
        choices=("mlp", "gated", "peer"),
    )
    hidden_width: int = option(704, "Hidden width (F) of mlp and gated.", minimum=1)
    activation: str = option(
        "silu",
        "Nonlinearity (of the gate, if gated). relu_squared: relu(x)^2; relu_squared_half: half of "
        "it (Parcae).",
        choices=ACTIVATIONS,
    )
    bias: bool = option(False, "Adds biases to its projections.")
    dropout_rate: float = option(0.0, "Dropout on the hidden layer.", minimum=0, below=1)
    peer: PeerConfig = section(PeerConfig, "Experts of kind='peer'.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("peer", "hidden_width", "bias")
    def _options_are_of_the_kind(self) -> None:
        """The peer section keeps its defaults unless kind='peer'; with kind='peer', hidden_width
        and bias keep theirs."""
        if self.kind == "peer":
            for name in ("hidden_width", "bias"):
                value, default = getattr(self, name), default_of(self.__dataclass_fields__[name])
                if value != default:
                    raise ConfigError(
                        name,
                        f"{value!r} (from the preset, the config file or a flag) would be ignored "
                        f"with kind='peer', whose experts peer.num_heads and peer.top_k choose; "
                        f"set its default with --config.model.mlp.{name}={default}, or use "
                        "another kind.",
                    )
        elif self.peer != PeerConfig():
            raise ConfigError(
                "peer", f"its options would be ignored with kind={self.kind!r}; set kind='peer'."
            )


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
    zero_outputs: bool = option(
        False,
        "Starts matrices that write into the residual stream at zero, so that every layer starts "
        "as the identity (Parcae).",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("std")
    def _std_needs_a_scheme_that_reads_it(self) -> None:
        """Only with scheme='normal' or 'scaled'; takase computes its own."""
        if self.scheme == "takase":
            require_defaults(
                self, ("std",), "with scheme='takase'", "use scheme='normal' or 'scaled'"
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
    residual: str = option(
        "plain",
        "How a layer's update f joins the residual stream x, wherever norm.placement has x + f. "
        "plain: x + f. rezero: x + alpha f with a learned number alpha per attention and "
        "feed-forward layer that starts at 0 (arXiv 2003.04887). admin: omega x + f with a learned "
        "vector omega that starts where a profiling pass over the first batch says "
        "(arXiv 2004.08249).",
        choices=("plain", "rezero", "admin"),
    )
    remat: str = option(
        "none",
        "What is recomputed in the backward pass. none: nothing. full: each core iteration and "
        "each other layer, those of encoders and decoders of images and sound included. dots: the "
        "same, but products and convolutions with weights are kept. offload: as full, but what is "
        "kept, the states between iterations and between other layers of the transformer, waits in "
        "the host's memory, which on a CPU is the same.",
        choices=("none", "full", "dots", "offload"),
    )
    scan_layers: bool = option(
        False,
        "Runs the layers of a stack in a loop over their stacked weights. Compile time then does "
        "not grow with the number of layers, but the weights are copied in every pass and nothing "
        "is fused across layers. Passes with a cache unroll the layers regardless.",
    )
    loss_weighting: str = option(
        "fixed",
        "How the losses of text, images and sound add up. fixed: by image.decoder.loss_weight and "
        "audio.decoder.loss_weight, with 1 for text. learned: each is multiplied by exp(-s) and s "
        "is added, with a learned s per kind (arXiv 1705.07115), after the fixed weights.",
        choices=("fixed", "learned"),
    )
    attention: AttentionConfig = section(AttentionConfig, "Self-attention.")
    value_embedding: ValueEmbeddingConfig = section(
        ValueEmbeddingConfig, "Token embeddings in the values of attention."
    )
    positions: PositionConfig = section(PositionConfig, "Position scheme.")
    norm: NormConfig = section(NormConfig, "Normalisation.")
    mlp: MlpConfig = section(MlpConfig, "Feed-forward layer.")
    init: InitConfig = section(InitConfig, "Initialisation.")
    sharing: SharingConfig = section(SharingConfig, "Layers that share weights.")
    recurrence: RecurrenceConfig = section(RecurrenceConfig, "Depth recurrence.")
    exit_gate: ExitGateConfig = section(ExitGateConfig, "Learned depth.")
    image: ImageConfig = section(ImageConfig, "Images.")
    audio: AudioConfig = section(AudioConfig, "Sound.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("width", "recurrence.core_width", "attention.head_dim")
    def _heads_fit_widths(self) -> None:
        """Without attention.head_dim, attention.num_heads divides width and core_width; head
        widths are even with rotary positions."""
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

    @rule("attention.is_causal")
    def _media_are_read_in_order(self) -> None:
        """True with images or sound."""
        if self.has_media and not self.attention.is_causal:
            raise ConfigError(
                "attention.is_causal",
                "False with images or sound, which stand in the order of a text; set it to True.",
            )

    @rule("width")
    def _sinusoidal_width_is_even(self) -> None:
        """Even with positions.scheme='sinusoidal'."""
        if self.positions.scheme == "sinusoidal" and self.width % 2:
            raise ConfigError(
                "width", f"{self.width} is odd; sinusoidal positions need an even width."
            )

    @rule("prelude_layers", "core_layers", "coda_layers")
    def _has_layers(self) -> None:
        """At least one layer in all."""
        if self.prelude_layers + self.core_layers + self.coda_layers == 0:
            raise ConfigError("prelude_layers", "there are no layers at all; give at least one.")

    @rule("residual", "norm.placement", "sharing.scheme")
    def _residual_fits_the_norms(self) -> None:
        """rezero needs norm.placement 'none', 'pre', 'peri' or 'output'; admin needs 'post', and
        sharing.scheme='none'."""
        placement = self.norm.placement
        if self.residual == "rezero" and placement in ("post", "sandwich"):
            raise ConfigError(
                "norm.placement",
                f"{placement!r} normalises the residual stream, so a layer would not start as the "
                "identity as residual='rezero' promises; use 'none', 'pre', 'peri' or 'output'.",
            )
        if self.residual == "admin" and placement != "post":
            raise ConfigError(
                "norm.placement",
                f"{placement!r} with residual='admin', which weighs the stream before it is "
                "normalised; use 'post'.",
            )
        if self.residual == "admin" and self.sharing.scheme != "none":
            raise ConfigError(
                "sharing.scheme",
                f"{self.sharing.scheme!r} with residual='admin': layers that share weights share "
                "omega, which depends on the place; use 'none'.",
            )

    @rule("init.zero_outputs", "residual", "norm.placement")
    def _zero_outputs_can_learn(self) -> None:
        """init.zero_outputs needs residual='plain' and norm.placement 'none', 'pre', 'post' or
        'sandwich'."""
        if not self.init.zero_outputs:
            return
        if self.residual != "plain":
            raise ConfigError(
                "residual",
                f"{self.residual!r} weighs layers by what they add, which is nothing with "
                "init.zero_outputs=True; use 'plain', or init.zero_outputs=False.",
            )
        if self.norm.placement in ("peri", "output"):
            raise ConfigError(
                "norm.placement",
                f"{self.norm.placement!r} normalises what a layer adds, which is zero with "
                "init.zero_outputs=True; use 'none', 'pre', 'post' or 'sandwich', or "
                "init.zero_outputs=False.",
            )

    @rule("recurrence.kept_every")
    def _groups_are_recomputed(self) -> None:
        """Above 1 only with remat other than 'none'."""
        if self.recurrence.kept_every > 1 and self.remat == "none":
            raise ConfigError(
                "recurrence.kept_every",
                f"{self.recurrence.kept_every} with remat='none' keeps all values of every "
                "iteration, so none need be computed again; set remat='full', or leave it at 1.",
            )

    @rule("scan_layers")
    def _scanned_stacks_have_layers(self) -> None:
        """True only with a stack of at least two layers."""
        if self.scan_layers and max(self.prelude_layers, self.core_layers, self.coda_layers) < 2:
            raise ConfigError(
                "scan_layers",
                "True has nothing to loop over: prelude, core and coda have less than two layers "
                "each; set scan_layers=False.",
            )

    @rule(*(f"attention.{stack}_windows" for stack in STACKS))
    def _windows_have_layers(self) -> None:
        """At most as many as the stack has layers; with scan_layers=True, layers that share weights
        have the same."""
        for stack in STACKS:
            windows, layers = self._own_windows(stack), getattr(self, f"{stack}_layers")
            if len(windows) > layers:
                raise ConfigError(
                    f"attention.{stack}_windows",
                    f"{windows!r} has {len(windows)} windows for {stack}_layers={layers}; give at "
                    "most one per layer.",
                )
            is_shared = self.scan_layers and self.sharing.scheme != "none"
            if is_shared and len(set(self.windows(stack))) > 1:
                raise ConfigError(
                    f"attention.{stack}_windows",
                    f"{windows!r} differ between layers that share weights, which "
                    "scan_layers=True cannot run in a loop; set scan_layers=False, "
                    "sharing.scheme='none', or one window for all.",
                )

    @rule("value_embedding.layers", "value_embedding.gate_channels", "sharing.scheme")
    def _value_embeddings_have_layers(self) -> None:
        """Value embeddings are of layers that there are, with sharing.scheme='none', and their
        gates read at most width and core_width channels."""
        own, layers = (
            self.value_embedding,
            sum(getattr(self, f"{stack}_layers") for stack in STACKS),
        )
        if not own.layers:
            return
        if own.layers[-1] >= layers:
            raise ConfigError(
                "value_embedding.layers",
                f"{own.layers!r} names layer {own.layers[-1]}, but prelude, core and coda have "
                f"{layers} layers, 0 to {layers - 1}; leave it out.",
            )
        if self.sharing.scheme != "none":
            raise ConfigError(
                "sharing.scheme",
                f"{self.sharing.scheme!r} with value embeddings: layers that share weights share "
                "their gates, but a table is of one layer; use 'none'.",
            )
        narrowest = min(self.width, self.core_width)
        if own.gate_channels > narrowest:
            raise ConfigError(
                "value_embedding.gate_channels",
                f"{own.gate_channels} is more than the {narrowest} channels of a layer's input; "
                f"use at most {narrowest}.",
            )

    @rule("recurrence")
    def _recurrence_needs_a_core(self) -> None:
        """Keep the default when core_layers=0."""
        if self.is_recurrent:
            return
        defaults = RecurrenceConfig()
        changed = [
            (field.name, getattr(self.recurrence, field.name), getattr(defaults, field.name))
            for field in dataclasses.fields(RecurrenceConfig)
            if getattr(self.recurrence, field.name) != getattr(defaults, field.name)
        ]
        if changed:
            values = ", ".join(f"{name}={value!r}" for name, value, _ in changed)
            flags = " ".join(
                f"--config.model.recurrence.{name}={default}" for name, _, default in changed
            )
            raise ConfigError(
                "recurrence",
                f"{values} (from the preset, the config file or a flag) would be ignored with "
                f"core_layers=0. Set the defaults with {flags}, or give the core at least one "
                "layer.",
            )

    @rule("sharing.prelude_unique", "sharing.core_unique", "sharing.coda_unique")
    def _unique_layers_are_layers(self) -> None:
        """At most the stack's layers, and fewer in one of the stacks."""
        fewer = self.sharing.scheme == "none"
        for stack in STACKS:
            layers, unique = getattr(self, f"{stack}_layers"), self.unique_layers(stack)
            fewer |= unique < layers
            if unique > layers:
                raise ConfigError(
                    f"sharing.{stack}_unique",
                    f"{unique} is more than {stack}_layers={layers}; use at most {layers} if that "
                    "is above 0, or None.",
                )
        if not fewer:
            raise ConfigError(
                "sharing.scheme",
                f"{self.sharing.scheme!r} shares nothing as long as all layers are unique; make "
                "one of the unique counts smaller than its stack, or set scheme='none'.",
            )

    @rule("exit_gate.enabled")
    def _gate_needs_a_core(self) -> None:
        """False when core_layers=0."""
        if self.exit_gate.enabled and not self.is_recurrent:
            raise ConfigError(
                "exit_gate.enabled",
                "True needs a core to stop, and core_layers=0; set it to False, or give the core "
                "at least one layer.",
            )

    @rule("head_bias")
    def _head_bias_needs_its_own_head(self) -> None:
        """True only with tie_embeddings=False."""
        if self.tie_embeddings and self.head_bias:
            raise ConfigError("head_bias", "True needs tie_embeddings=False; set head_bias=False.")

    @rule("image", "audio")
    def _media_options_need_media(self) -> None:
        """Keep the default unless image.enabled=True or audio.enabled=True."""
        for name, default in (("image", ImageConfig()), ("audio", AudioConfig())):
            own = getattr(self, name)
            if not own.enabled and own != default:
                raise ConfigError(
                    name,
                    f"its options would be ignored with {name}.enabled=False; set "
                    f"{name}.enabled=True.",
                )

    @rule("loss_weighting")
    def _learned_weights_need_several_losses(self) -> None:
        """'learned' only with image.enabled=True or audio.enabled=True."""
        if self.loss_weighting == "learned" and not self.has_media:
            raise ConfigError(
                "loss_weighting",
                "'learned' has nothing to weigh against the text's loss; set it to 'fixed', or "
                "enable image or audio.",
            )

    @property
    def has_media(self) -> bool:
        """Whether the model reads and makes anything but text."""
        return self.image.enabled or self.audio.enabled

    @property
    def is_recurrent(self) -> bool:
        """Whether there is a core to iterate."""
        return self.core_layers > 0

    @property
    def core_width(self) -> int:
        """Width of the core after resolving None."""
        own = self.recurrence.core_width
        return self.width if own is None else own

    @property
    def state_width(self) -> int:
        """Width of the core's state: that of the core, for each of its streams."""
        return self.core_width * max(1, self.recurrence.hyper_connections)

    def unique_layers(self, stack: str) -> int:
        """Different layers of 'prelude', 'core' or 'coda' after resolving None."""
        own = getattr(self.sharing, f"{stack}_unique")
        return getattr(self, f"{stack}_layers") if own is None else own

    def windows(self, stack: str) -> tuple[int | None, ...]:
        """The sliding window of each layer of 'prelude', 'core' or 'coda'; None: no limit."""
        own = self._own_windows(stack)
        layers: int = getattr(self, f"{stack}_layers")
        if not own:
            return (self.attention.window,) * layers
        return tuple(own[layer % len(own)] or None for layer in range(layers))

    def value_layers(self, stack: str) -> tuple[int, ...]:
        """Places in 'prelude', 'core' or 'coda' of the layers with value embeddings."""
        first = self.first_layer(stack)
        layers: int = getattr(self, f"{stack}_layers")
        chosen = self.value_embedding.layers
        return tuple(place for place in range(layers) if first + place in chosen)

    def first_layer(self, stack: str) -> int:
        """The number of a stack's first layer, counted through prelude, core and coda."""
        before = STACKS[: STACKS.index(stack)]
        return sum(getattr(self, f"{name}_layers") for name in before)

    def _own_windows(self, stack: str) -> tuple[int, ...]:
        own: tuple[int, ...] = getattr(self.attention, f"{stack}_windows")
        return own

    def head_dim(self, width: int) -> int:
        """Width of one attention head in a layer of this width."""
        own = self.attention.head_dim
        return width // self.attention.num_heads if own is None else own
