"""The model: embedding, prelude, recurrent core, coda, head, and parts for images and sound."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.core import unfreeze
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.core import (
    Pass,
    RecurrentCore,
    at_iteration,
    recur_reading,
)
from megatransformer_jax.models.gate_readout import GateReadout
from megatransformer_jax.models.implicit import recur_as_configured
from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.models.media.parts import MediaParts
from megatransformer_jax.nn.adapters import ExitGate, identity
from megatransformer_jax.nn.block import Stack
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.nn.cut_matrices import gather_matrix
from megatransformer_jax.nn.embedding import TextEmbedding, ValueEmbedding
from megatransformer_jax.nn.layer_sharing import stack_owners
from megatransformer_jax.nn.loop_parameters import begin_streams, mean_stream
from megatransformer_jax.nn.norms import Norm
from megatransformer_jax.nn.parameters import axes_of, check_shapes, matrix, weight_init
from megatransformer_jax.nn.quantized import is_matrix_node
from megatransformer_jax.ops.interleave import Layout, interleave, place_media, take_places
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import alibi_slopes, rotary_table
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy, MediaBatch, ModelOutput

# Collections that a forward pass sows the core's raw state into, [B, T, state width]: the last one
# and, in passes with gradients, the one before the last iteration.
LAST_STATE, PREVIOUS_STATE = "last_state", "previous_state"


@struct.dataclass
class Entered:
    """What the core and the coda read, S places per row; S is T without media.

    Attributes:
      x: the prelude's output, and media as their encoders leave them.
      positions: place of each within its document.
      segment_ids: document of each, 0 for padding; None if there is one per row.
      layout: where text and media are. None without media.
      value_embeddings: of the text, for `LayerContext`.
    """

    x: Float[Array, "B S D"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"] | None
    layout: Layout | None
    value_embeddings: dict[str, Float[Array, "_ B S K H"]] | None = None

    def context(self, config: ModelConfig, width: int, deterministic: bool = True) -> LayerContext:
        """What the layers of core (at its width) or coda share in a pass over these rows."""
        context = pass_context(config, self.positions, self.segment_ids, width, deterministic)
        return dataclasses.replace(context, value_embeddings=self.value_embeddings)

    @property
    def is_token(self) -> Bool[Array, "B S"]:
        """Places that hold a token or a part of a medium; the others are padding."""
        if self.segment_ids is None:
            return jnp.ones(self.positions.shape, bool)
        return self.segment_ids > 0

    @property
    def is_text(self) -> Bool[Array, "B S"]:
        """Places that hold a token."""
        return self.is_token if self.layout is None else self.is_token & ~self.layout.is_medium

    def at_text(self, values: Shaped[Array, "B S *D"]) -> Shaped[Array, "B T *D"]:
        """Of values of all places those of the text; zeros at its padding if there are media."""
        return values if self.layout is None else take_places(values, self.layout.text_places)

    def from_text(self, values: Shaped[Array, "B T *D"]) -> Shaped[Array, "B S *D"]:
        """Values of the text at their places, zeros at those of media."""
        return values if self.layout is None else interleave(self.layout, values)


class MegaTransformer(nn.Module):
    """A causal language model whose core is iterated `num_steps` times.

    As in Huginn, one norm serves twice: on the core's final state (`recurrence.output_norm`) and
    before the head (`recurrence.head_norm`). Without a core (`core_layers=0`) it is a plain causal
    LM, and the norm stands before the head only.
    """

    config: ModelConfig
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    def setup(self) -> None:
        """Declares all parts; the core's parameters are one tree, so that a loop can take them."""
        config = self.config
        init = weight_init(config, config.width)
        parts = (init, self.policy, self.sharder, self.platform, config.remat)
        self.embedding = TextEmbedding(config, init, self.policy, self.sharder)
        if config.value_embedding.layers:
            self.value_embedding = ValueEmbedding(config, init, self.policy, self.sharder)
        self.prelude = Stack(config, stack_owners(config, "prelude"), *parts, "prelude")
        self.coda = Stack(config, stack_owners(config, "coda"), *parts, "coda")
        self.final_norm = Norm(config.norm)
        if config.is_recurrent:
            self.core_params = self._declare_core()
            if config.core_width != config.width:
                shape, axes = (config.width, config.core_width), ("embed", "core_out")
                self.core_in = matrix(self, "core_in", init.input, shape, axes, self.policy)
                core_init = weight_init(config, config.core_width).input
                self.core_out = matrix(self, "core_out", core_init, shape[::-1], axes, self.policy)
            if config.recurrence.injection_norm:
                self.injection_norm = Norm(config.norm)
            if config.recurrence.readout_matrix:
                shape, axes = (config.width, config.width), ("embed", "core_out")
                self.c_matrix = matrix(self, "c_matrix", identity, shape, axes, self.policy)
            if config.exit_gate.enabled:
                self.exit_gate = ExitGate(config)
        if config.has_media:
            self.media = MediaParts(config, self.policy, self.sharder, self.platform)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        num_steps: Int[Array, "*draws"] | int,
        backprop_depth: int = 0,
        state: Float[Array, "B S D"] | None = None,
        head_mask: Float[Array, "L N"] | None = None,
        deterministic: bool = True,
        media: MediaBatch | None = None,
        fills_slots: bool = False,
        readout: GateReadout | None = None,
    ) -> ModelOutput:
        """Scores the next token at every position.

        Args:
          tokens: token ids; with media, those of the text alone.
          positions: position of each token in its document. None: 0, 1, 2, ...
          segment_ids: document of each token, 0 for padding. None: one document per row.
          num_steps: iterations of the core: [], [B] or [B, T]; traced. Ignored without a core.
          backprop_depth: last iterations that gradients flow through; 0 for inference.
          state: the core's first state, [B, T, state width]. None: `recurrence.state_init`, from
            the rng stream 'state'.
          head_mask: factor on the output of each head, one row per layer: prelude, core, coda.
          deterministic: no dropout. Otherwise the rng stream 'dropout' is needed.
          media: images and sound between the tokens. `positions` are not used then, and
            `num_steps` and `state` are those of the sequences with the media in them, S for T.
          fills_slots: static; says that the media fill next to all of their slots. Otherwise the
            encoders skip the empty ones.
          readout: what coda and head read of the iterations, as the exit gate says. None: the last
            state. Only for inference.

        Returns:
          Logits of the tokens; the latent, which is the core's state after
          `recurrence.output_norm`, of the whole sequence; the conditions of media slots.

        Raises:
          ValueError: if there is a readout and no exit gate, or gradients are asked for.
        """
        config = self.config
        masks = self._split_head_mask(head_mask)
        entered = self.enter(
            tokens,
            positions,
            segment_ids,
            media,
            head_mask=masks[0],
            deterministic=deterministic,
            fills_slots=fills_slots,
        )
        x, outer = entered.x, entered.context(config, config.width, deterministic)
        if config.is_recurrent:
            inner = entered.context(config, config.core_width, deterministic)
            inner = dataclasses.replace(inner, head_mask=masks[1])
            steps = jnp.asarray(num_steps)
            x = self._iterate_core(x, inner, steps, backprop_depth, state, readout)
            if config.exit_gate.enabled and self.is_initializing():
                self.run_gate(x)
        latent, x = self.run_coda(x, dataclasses.replace(outer, head_mask=masks[2]))
        logits = self.run_head(entered.at_text(x))
        if entered.layout is None:
            return ModelOutput(logits, latent)
        conditions = self.media.conditions(entered.layout, latent, deterministic)
        return ModelOutput(logits, latent, conditions)

    def enter(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        media: MediaBatch | None = None,
        *,
        head_mask: Float[Array, "L N"] | None = None,
        deterministic: bool = True,
        fills_slots: bool = False,
    ) -> Entered:
        """Everything that comes before the core; arguments as in a call.

        The text's prelude runs at the text's places of the sequence, so that its positions are
        those of the sequence, and sees no media.
        """
        config = self.config
        if media is None:
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            values = self.embed_values(tokens)
            context = pass_context(config, positions, segment_ids, config.width, deterministic)
            context = dataclasses.replace(context, head_mask=head_mask, value_embeddings=values)
            x = self.run_prelude(tokens, positions, context)
            if config.has_media and self.is_initializing():
                self.media.declare()
            return Entered(x, positions, segment_ids, None, values)
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        layout = self.media.layout(media, segment_ids)
        text_segments = jnp.where(layout.is_medium, 0, layout.segment_ids)
        context = pass_context(config, layout.positions, text_segments, config.width, deterministic)
        tokens = interleave(layout, tokens)
        values = self.embed_values(tokens, ~layout.is_medium)
        context = dataclasses.replace(context, head_mask=head_mask, value_embeddings=values)
        x = self.run_prelude(tokens, layout.positions, context)
        images, clips = self.media.encode(media, deterministic, fills_slots=fills_slots)
        x = jnp.where(layout.is_medium[..., None], place_media(layout, images, clips), x)
        x = self.sharder.constrain(x, "batch", "length", None)
        return Entered(x, layout.positions, layout.segment_ids, layout, values)

    def image_loss(
        self, images: Float[Array, "N H W C"], condition: Condition, key: Key[Array, ""]
    ) -> dict[str, Float[Array, "N"]]:
        """Loss terms of drawing images, see `MediaDecoder.loss`."""
        return self.media.image_loss(images, condition, key)

    def audio_loss(
        self,
        mels: Float[Array, "N F M"],
        lengths: Int[Array, "N"],
        condition: Condition,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "N"]]:
        """Loss terms of making clips, see `MediaDecoder.loss`."""
        return self.media.audio_loss(mels, lengths, condition, key)

    def sample_images(
        self, condition: Condition, key: Key[Array, ""], settings: Any = None
    ) -> Float[Array, "N H W C"]:
        """Images in [-1, 1], see `MediaDecoder.sample`."""
        return self.media.sample_images(condition, key, settings)

    def sample_audio(
        self,
        condition: Condition,
        key: Key[Array, ""],
        lengths: Int[Array, "N"] | None = None,
        settings: Any = None,
    ) -> tuple[Float[Array, "N F M"], Int[Array, "N"]]:
        """Normalised mel spectrograms and their frames, see `MediaDecoder.sample`."""
        return self.media.sample_audio(condition, key, lengths, settings)

    def run_prelude(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], context: LayerContext
    ) -> Float[Array, "B T D"]:
        """Embedding and prelude."""
        return self.prelude(self.embedding(tokens, positions, context.deterministic), context)

    def embed_values(
        self, tokens: Int[Array, "B T"], is_text: Bool[Array, "B T"] | None = None
    ) -> dict[str, Float[Array, "_ B T K H"]] | None:
        """`LayerContext.value_embeddings` of tokens; zeros where there is no text. None if the
        model has no value embeddings."""
        if not self.config.value_embedding.layers:
            return None
        return self.value_embedding(tokens, is_text)

    def enter_core(self, x: Float[Array, "B T D"], context: LayerContext) -> Pass:
        """What the iterations need, from the prelude's output.

        Args:
          x: the prelude's output.
          context: for the core's layers.
        """
        injected = self._injection(x)
        core, params = self.core_module(), self._gathered_core_params()
        prepared = core.apply({"params": params}, injected, method="prepare")
        return Pass(core, params, injected, cast(jax.Array, prepared), context)

    def run_coda(
        self, x: Float[Array, "B T D"], context: LayerContext
    ) -> tuple[Float[Array, "B T D2"], Float[Array, "B T D2"]]:
        """Latent and coda's output from the core's last state (or the prelude's output)."""
        if self.config.is_recurrent:
            x = mean_stream(x, self.config.recurrence.hyper_connections)
            if self.config.core_width != self.config.width:
                x = x @ self.core_out
            if self.config.recurrence.readout_matrix:
                x = x @ self.c_matrix
            if self.config.recurrence.output_norm:
                x = self.final_norm(x)
        return x, self.coda(x, context)

    def run_gate(self, state: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Logits of stopping after the iteration that made the core's `state`.

        Raises:
          ValueError: if the model has no exit gate.
        """
        self._check_gate()
        return self.exit_gate(state)

    def _check_gate(self) -> None:
        if not self.config.exit_gate.enabled:
            raise ValueError(
                "this model has no exit gate; train one with model.exit_gate.enabled=True, or "
                "choose another exit criterion."
            )

    def run_head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits from the coda's output."""
        return self.embedding.logits(self.final_norm(x) if self.config.recurrence.head_norm else x)

    def _iterate_core(
        self,
        x: jax.Array,
        context: LayerContext,
        num_steps: jax.Array,
        backprop_depth: int,
        state: jax.Array | None,
        readout: GateReadout | None,
    ) -> jax.Array:
        """What coda and head read."""
        config, core = self.config, self.enter_core(x, context)
        if state is None:
            needs_key = config.recurrence.state_init not in ("zero", "none")
            state = core.first_state(self.make_rng("state") if needs_key else None)
        else:
            state = core.place(state)
        if not context.deterministic:
            core = core.replace(dropout_key=self.make_rng("dropout"))  # type: ignore[attr-defined]
        if readout is None:
            sow_previous = functools.partial(self.sow, PREVIOUS_STATE, "state")
            sees = self.is_mutable_collection(PREVIOUS_STATE)
            arguments = (core, state, num_steps, backprop_depth, sow_previous if sees else None)
            read = last = recur_as_configured(*arguments, self.sow)
        else:
            if backprop_depth:
                raise ValueError(
                    f"backprop_depth is {backprop_depth}, and a readout is for inference alone; "
                    "leave out either."
                )
            last, read = recur_reading(core, state, num_steps, readout, self._gate_of())
        self.sow(LAST_STATE, "state", last)
        return read

    def _gate_of(self) -> Callable[[jax.Array], jax.Array]:
        """`run_gate` as a pure function, which a loop can call."""
        self._check_gate()
        gate = ExitGate(self.config, parent=None)
        variables = {"params": self.exit_gate.variables["params"]}
        return lambda state: cast(jax.Array, gate.apply(variables, state))

    def _injection(self, x: jax.Array) -> jax.Array:
        if self.config.recurrence.injection_norm:
            x = self.injection_norm(x)
        return x if self.config.core_width == self.config.width else x @ self.core_in

    def _gathered_core_params(self) -> Any:
        """The core's weights in the compute type, whole on every fsdp device before the loop."""
        axes = axes_of(_abstract_core(self.config, self.policy, self.platform))
        # Linen freezes dicts that `setup` stores.
        return _gather(unfreeze(self.core_params), axes, self.policy, self.sharder)

    def _declare_core(self) -> Any:
        if self.has_variable("params", "core"):
            stored: Any = nn.meta.unbox(self.get_variable("params", "core"))
            nodes = jax.tree.leaves(stored, is_leaf=is_matrix_node)
            if not any(map(is_matrix_node, nodes)):
                expected = _abstract_core(self.config, self.policy, self.platform)
                check_shapes(self, "core", stored, expected)
            return stored
        init = functools.partial(_init_core, self.config, self.policy, self.platform)
        return self.param("core", init)

    def core_module(self) -> RecurrentCore:
        """The module of one iteration; its parameters are the tree `core` of this module's."""
        return RecurrentCore(self.config, self.policy, self.sharder, self.platform, parent=None)

    def _split_head_mask(self, head_mask: jax.Array | None) -> tuple[jax.Array | None, ...]:
        config = self.config
        if head_mask is None:
            return None, None, None
        first, last = config.prelude_layers, config.prelude_layers + config.core_layers
        wanted = (last + config.coda_layers, config.attention.num_heads)
        if head_mask.shape != wanted:
            raise ValueError(
                f"head_mask has shape {head_mask.shape}; it must be {wanted}: one row per layer "
                "of prelude, core and coda, one column per head"
            )
        return head_mask[:first], head_mask[first:last], head_mask[last:]


def _init_core(config: ModelConfig, policy: DTypePolicy, platform: str, key: Key[Array, ""]) -> Any:
    injected = jnp.zeros((1, 1, config.core_width), policy.compute)
    state = begin_streams(injected, config.recurrence.hyper_connections)
    context = pass_context(config, jnp.zeros((1, 1), jnp.int32), None, config.core_width)
    shape = (len(config.value_layers("core")), 1, 1, config.attention.kv_heads)
    rows = jnp.zeros((*shape, config.head_dim(config.core_width)), policy.compute)
    context = at_iteration(config, dataclasses.replace(context, value_embeddings={"core": rows}), 0)
    core = RecurrentCore(_with_xla_attention(config), policy, Sharder(), platform, parent=None)
    return core.init(key, state, injected, context, method="prepare_and_call")["params"]


@functools.lru_cache(maxsize=8)
def _abstract_core(config: ModelConfig, policy: DTypePolicy, platform: str) -> Any:
    """The core's parameters, boxed and without values. Kept, as every pass asks for them."""
    return jax.eval_shape(lambda key: _init_core(config, policy, platform, key), jax.random.key(0))


def pass_context(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    width: int,
    deterministic: bool = True,
) -> LayerContext:
    """What the layers of a stack of this width share in a pass over whole rows, without a cache."""
    mask = AttentionMask(
        is_causal=config.attention.is_causal,
        window=config.attention.window,
        query_segment_ids=segment_ids,
        key_segment_ids=segment_ids,
    )
    return layer_context(config, positions, mask, width, deterministic)


def layer_context(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    mask: AttentionMask,
    width: int,
    deterministic: bool = True,
) -> LayerContext:
    """What the layers of a stack of this width share; positions as `config.positions` says."""
    scheme = config.positions.scheme
    rotary = None
    if scheme == "rotary":
        base, scaling = config.positions.rotary_base, config.positions.scaling
        rotary = rotary_table(positions, config.head_dim(width), base, scaling)
    slopes = alibi_slopes(config.attention.num_heads) if scheme == "alibi" else None
    return LayerContext(mask, rotary, slopes, None, deterministic)


def open_pass(
    model: MegaTransformer, params: Any, x: Float[Array, "B T D"], context: LayerContext
) -> Pass:
    """`MegaTransformer.enter_core`, from outside of the module."""
    return cast(Pass, model.apply({"params": params}, x, context, method="enter_core"))


def with_values(
    model: MegaTransformer,
    params: Any,
    context: LayerContext,
    tokens: Int[Array, "B T"],
    is_text: Bool[Array, "B T"] | None = None,
) -> LayerContext:
    """The context with `MegaTransformer.embed_values` of its tokens, from outside of the module."""
    if not model.config.value_embedding.layers:
        return context
    values = model.apply({"params": params}, tokens, is_text, method="embed_values")
    return dataclasses.replace(context, value_embeddings=cast(Any, values))


def build_model(
    config: ModelConfig, policy: DTypePolicy, sharder: Sharder, platform: str
) -> MegaTransformer:
    """The model for a config. `platform` ('cpu', 'gpu', 'tpu') decides attention kernels."""
    return MegaTransformer(config, policy, sharder, platform)


def init_params(model: MegaTransformer, key: Key[Array, ""]) -> Any:
    """Fresh parameters: nested dict of float32 arrays."""
    # Compiled, so that the forward pass that linen traces to find the parameters is dropped.
    return jax.jit(lambda key: nn.meta.unbox(_init_boxed(model, key)))(key)


def abstract_params(model: MegaTransformer) -> Any:
    """The tree of `init_params` with shapes and types in place of arrays."""
    return nn.meta.unbox(_abstract_boxed(off_mesh(model)))


def param_axes(model: MegaTransformer) -> Any:
    """Logical axis names of every parameter, in the tree of `init_params`."""
    return axes_of(_abstract_boxed(off_mesh(model)))


def gather_weights(model: MegaTransformer, params: Any) -> Any:
    """All weights in the compute type and whole on every fsdp device.

    Called before a loop of passes, so that they are gathered once and not in each. Changes nothing
    without a mesh.
    """
    if model.sharder.mesh is None:
        return params
    return _gather(params, param_axes(model), model.policy, model.sharder)


def _gather(params: Any, axes: Any, policy: DTypePolicy, sharder: Sharder) -> Any:
    def to_compute(weight: Any, names: tuple[str | None, ...]) -> Any:
        # Vectors (norm scales, biases, a_log, dt_bias) stay float32.
        is_matrix = any(name is not None for name in names) and weight.ndim > 1
        # Of a quantised matrix this says what type its products have.
        return weight.astype(policy.compute) if is_matrix else weight

    in_compute = jax.tree.map(to_compute, params, axes, is_leaf=is_matrix_node)
    gather = functools.partial(gather_matrix, sharder=sharder)
    return jax.tree.map(gather, in_compute, axes, is_leaf=is_matrix_node)


def _with_xla_attention(config: ModelConfig) -> ModelConfig:
    """The same model with the attention kernel that serves every shape, on every platform."""
    return dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, kernel="xla")
    )


def with_xla_attention(model: MegaTransformer) -> MegaTransformer:
    """The same model for derivatives that fused kernels lack: forward mode, and of second order."""
    return model.copy(config=_with_xla_attention(model.config))


def off_mesh(model: MegaTransformer) -> MegaTransformer:
    """The same model for inputs of any shape: no constraint of a mesh or of a fused kernel."""
    return model.copy(config=_with_xla_attention(model.config), sharder=Sharder())


@functools.lru_cache(maxsize=8)
def _abstract_boxed(alone: MegaTransformer) -> Any:
    """Kept, because a trace of a large model takes seconds and a run asks for it several times."""
    return jax.eval_shape(lambda key: _init_boxed(alone, key), jax.random.key(0))


def _init_boxed(model: MegaTransformer, key: jax.Array) -> Any:
    # Shapes of parameters depend on no input, so the smallest will do, without a mesh.
    alone = off_mesh(model)
    tokens = jnp.zeros((1, 1), jnp.int32)
    rngs = dict(zip(("params", "state"), jax.random.split(key), strict=True))
    return alone.init(rngs, tokens, num_steps=1)["params"]
