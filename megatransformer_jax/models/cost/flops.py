"""Floating-point operations: of a text model per token, of media per medium, of any function.

Matrix products only: one with an m x n matrix costs 2 m n per token. What acts channel by channel
(norms, activations, rotary positions, softmax) is left out, as is usual; at common widths it is a
few percent. Costs come from the config alone; only networks whose formulas would repeat their code
are traced, on abstract arrays.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend import core

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.models.megatransformer import MegaTransformer, abstract_params

# ------------------------------------------------------------------------------
# The text model.


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs per token of one forward pass: part -> matrix product -> FLOPs.

    Attributes:
      once: parts that run once.
      iteration: products of one iteration of the core; empty without a core.
    """

    once: Mapping[str, Mapping[str, float]]
    iteration: Mapping[str, float]

    @property
    def once_total(self) -> float:
        """All that runs once."""
        return sum((sum(products.values()) for products in self.once.values()), 0.0)

    @property
    def iteration_total(self) -> float:
        """One iteration of the core."""
        return sum(self.iteration.values(), 0.0)

    def total(self, depth: int) -> float:
        """A forward pass with `depth` iterations."""
        return self.once_total + depth * self.iteration_total


@dataclasses.dataclass(frozen=True)
class TrainFlops:
    """FLOPs per token of one training step.

    Attributes:
      model: what the mathematics needs: a backward pass costs two forward passes, and iterations
        without gradients have none. The number to use for utilisation.
      hardware: what is computed at most: model FLOPs, what remat computes again, and gradient
        iterations that are masked because the draw is below the backprop depth.
    """

    model: float
    hardware: float


def mean_keys(length: int, window: int | None) -> float:
    """Keys that a query of a causal row of `length` tokens sees, on average."""
    window = length if window is None else min(window, length)
    # The first `window` queries see 1, 2, ..., window keys, the others `window` each.
    return (window * (window + 1) / 2 + (length - window) * window) / length


def forward_flops(
    config: ModelConfig, length: int, *, visible_keys_only: bool = True
) -> ForwardFlops:
    """Counts a forward pass over rows of `length` tokens, one document each.

    Args:
      config: the model.
      length: tokens per row; only attention depends on it.
      visible_keys_only: attention counts the keys that causality and window let a query see. False
        counts all keys of the row, as a kernel that multiplies first and masks later computes.
    """

    def keys(stack: str) -> float:
        windows = config.windows(stack)
        if not visible_keys_only or not windows or not config.attention.is_causal:
            return float(length)
        return sum(mean_keys(length, window) for window in windows) / len(windows)

    def outer(stack: str) -> dict[str, float]:
        layers: int = getattr(config, f"{stack}_layers")
        products = _times(layers, _layer(config, config.width, keys(stack)))
        return products | _value_gates(config, stack)

    once = {"prelude": outer("prelude")}
    iteration: Mapping[str, float] = {}
    if config.is_recurrent:
        width, adapter = config.core_width, config.recurrence.adapter
        injection = {"adapter": 2.0 * width**2 if adapter in ("linear", "diagonal") else 0.0}
        iteration = _times(config.core_layers, _layer(config, width, keys("core")))
        iteration |= {"adapter": 2.0 * width**2 if adapter == "linear" else 0.0}
        if config.recurrence.loop_lora_rank:
            iteration["loop_lora"] = config.core_layers * _low_rank(config, width)
        iteration |= _value_gates(config, "core")
        if width != config.width:
            injection["core_in"] = 2.0 * config.width * width
        once["injection"] = injection
        readout = {"core_out": 2.0 * width * config.width} if width != config.width else {}
        if config.recurrence.readout_matrix:
            readout["c_matrix"] = 2.0 * config.width**2
        if readout:
            once["core_out"] = readout
    once["coda"] = outer("coda")
    once["head"] = {"head": 2.0 * config.width * config.vocab_size}
    return ForwardFlops(once, iteration)


def train_flops(config: ModelConfig, forward: ForwardFlops, num_steps: int) -> TrainFlops:
    """Counts a training step whose draw is `num_steps`.

    The last `backprop_depth` iterations have gradients, the ones before run forward only. With the
    implicit gradient the last one has, and each further term costs a product with its Jacobian, as
    much as an iteration. Rows that settle early, which cost less, are not counted.

    Args:
      config: the model that `forward` was counted for.
      forward: its forward pass.
      num_steps: iterations; of no meaning without a core.
    """
    backprop_depth, iteration = config.recurrence.backprop_depth, forward.iteration_total
    layers = [forward.once["prelude"], forward.once["coda"]]
    again = sum((_recomputed(config, products) for products in layers), 0.0)
    if config.recurrence.gradient == "implicit":
        terms = min(num_steps, backprop_depth)
        model = 3 * forward.once_total + (num_steps + 2 + terms - 1) * iteration
        # The last iteration is computed again as a whole, with any `remat`.
        remat = config.remat if config.remat == "none" else "full"
        again += _recomputed(dataclasses.replace(config, remat=remat), forward.iteration)
        return TrainFlops(
            model=model, hardware=model + (backprop_depth - terms) * iteration + again
        )
    with_gradient = min(num_steps, backprop_depth)
    without = num_steps - with_gradient
    model = 3 * forward.once_total + (without + 3 * with_gradient) * iteration
    masked = (backprop_depth - with_gradient) * 3 * iteration
    again += backprop_depth * _recomputed(config, forward.iteration)
    if config.recurrence.kept_every > 1:
        again += backprop_depth * iteration
    return TrainFlops(model=model, hardware=model + masked + again)


def _layer(config: ModelConfig, width: int, keys: float) -> dict[str, float]:
    attention, head_dim = config.attention, config.head_dim(width)
    heads_width = attention.num_heads * head_dim
    return {
        "qkv": 2.0 * width * (heads_width + 2 * attention.kv_heads * head_dim),
        "attention": 2 * 2.0 * heads_width * keys,  # Logits, and the mixture of values.
        "output": 2.0 * heads_width * width,
        **_feed_forward(config, width),
    }


def _value_gates(config: ModelConfig, stack: str) -> dict[str, float]:
    """Of a stack's layers with value embeddings, whose rows are looked up and cost nothing."""
    layers = len(config.value_layers(stack))
    channels = config.value_embedding.gate_channels
    return {"value_gate": 2.0 * layers * channels * config.attention.kv_heads} if layers else {}


def _low_rank(config: ModelConfig, width: int) -> float:
    """Of one core layer's updates, where all tokens are at the same iteration."""
    attention, head_dim = config.attention, config.head_dim(width)
    heads_width = attention.num_heads * head_dim
    sides = [width + heads_width + 2 * attention.kv_heads * head_dim, heads_width + width]
    if config.mlp.kind != "peer":
        branches = 2 if config.mlp.kind == "gated" else 1
        hidden_width = config.mlp.hidden_width
        sides += [width + branches * hidden_width, hidden_width + width]
    return 2.0 * config.recurrence.loop_lora_rank * sum(sides)


def _feed_forward(config: ModelConfig, width: int) -> dict[str, float]:
    """Of PEER, `up` and `down` are the experts that a token gets."""
    if config.mlp.kind == "peer":
        peer = config.mlp.peer
        one_way = 2.0 * width * peer.num_heads * peer.top_k
        queries = peer.num_heads * peer.key_dim
        return {
            "query": 2.0 * width * queries,
            "keys": 2.0 * queries * peer.num_keys,
            "up": one_way,
            "down": one_way,
        }
    hidden_width, branches = config.mlp.hidden_width, 2 if config.mlp.kind == "gated" else 1
    return {"up": 2.0 * width * branches * hidden_width, "down": 2.0 * hidden_width * width}


def _times(count: int, products: Mapping[str, float]) -> dict[str, float]:
    return {name: count * flops for name, flops in products.items()}


def _recomputed(config: ModelConfig, products: Mapping[str, float]) -> float:
    """FLOPs that the backward pass computes a second time; PEER's at most."""
    # PEER gathers its experts again, and compares queries again if it does so in blocks.
    always, without_weights = 0.0, products.get("attention", 0.0)  # Attention has no weights.
    if config.mlp.kind == "peer" and products:
        always = products["keys"] + products["up"]
        without_weights += products["keys"] + products["up"] + products["down"]
    match config.remat:
        case "none":
            return always
        case "full" | "offload":
            return always + sum(products.values(), 0.0)
        case "dots":  # Keeps products with weights that all tokens share.
            return always + without_weights
    raise ValueError(f"unknown remat {config.remat!r}; known: none, full, dots, offload")


# ------------------------------------------------------------------------------
# Floating-point operations of images and sound, per medium, from the config alone.


@dataclasses.dataclass(frozen=True)
class MediumFlops:
    """FLOPs of one image, or of one clip of the most frames, in forward passes.

    Attributes:
      places: positions of the sequence that it takes.
      prelude: its encoder.
      coda: what its decoder reads, from a full window.
      decoder: what a training step asks of its decoder: one call of the network.
      sampling: making it, all steps of the config's sampler, with guidance if it has one.
      sampling_steps: how many these are.
    """

    places: int
    prelude: float
    coda: float
    decoder: float
    sampling: float
    sampling_steps: int

    @property
    def forward(self) -> float:
        """Encoder, coda and decoder once each, as for a medium that is learned to be made."""
        return self.prelude + self.coda + self.decoder


def media_flops(model: MegaTransformer) -> dict[str, MediumFlops]:
    """'image' and 'audio', as far as the model has them, counted by tracing their parts.

    Args:
      model: off any mesh; a kernel of attention that cannot be counted does not matter, as these
        parts take none.
    """
    config, params = model.config, abstract_params(model)
    found = {}
    if config.image.enabled:
        image = jax.ShapeDtypeStruct((1, *config.image.shape), jnp.float32)
        found["image"] = _count(model, params, "image", (image,))
    if config.audio.enabled:
        shape = (1, config.audio.max_frames, config.audio.mel.num_mels)
        clip = jax.ShapeDtypeStruct(shape, jnp.float32)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        found["audio"] = _count(model, params, "audio", (clip, lengths))
    return found


def _count(
    model: MegaTransformer, params: Any, kind: str, media: tuple[jax.ShapeDtypeStruct, ...]
) -> MediumFlops:
    config: Any = getattr(model.config, kind)
    window = (1, config.context_length)
    latents = jax.ShapeDtypeStruct((*window, model.config.width), model.policy.compute)
    exists = jax.ShapeDtypeStruct(window, jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0))
    sampler = config.decoder.settings if kind == "image" else config.decoder.sampler

    def apply(method: Any, *arguments: Any) -> float:
        def call(params: Any, *arguments: Any) -> Any:
            return model.apply({"params": params}, *arguments, method=method)

        return product_flops(call, params, *arguments)

    def encode(model: MegaTransformer, media: jax.Array, lengths: jax.Array | None = None) -> Any:
        prelude = getattr(model.media, f"{kind}_prelude")
        return prelude(media, lengths, True).embeddings

    def conclude(model: MegaTransformer, latents: jax.Array, exists: jax.Array) -> Condition:
        return cast(Condition, getattr(model.media, f"{kind}_coda")(latents, exists, True))

    def conclude_apart(params: Any, *arguments: Any) -> tuple[jax.Array, jax.Array]:
        condition: Any = model.apply({"params": params}, *arguments, method=conclude)
        return condition.context, condition.is_context

    said = jax.eval_shape(conclude_apart, params, latents, exists)

    # Conditions are put together inside, from arrays: here there are only shapes.
    def learn(model: MegaTransformer, media: Any, context: Any, exists: Any, key: Any) -> Any:
        learn_one: Any = model.image_loss if kind == "image" else model.audio_loss
        return learn_one(*media, Condition(context, exists), key)

    def make(model: MegaTransformer, context: Any, exists: Any, key: Any) -> Any:
        make_one: Any = model.sample_images if kind == "image" else model.sample_audio
        return make_one(Condition(context, exists), key)

    return MediumFlops(
        places=config.num_tokens,
        prelude=apply(encode, *media),
        coda=apply(conclude, latents, exists),
        decoder=apply(learn, media, *said, key),
        sampling=apply(make, *said, key),
        sampling_steps=sampler.num_steps,
    )


# ------------------------------------------------------------------------------
# Floating-point operations of a function, read off its trace on abstract arrays.
#
# For networks whose formulas would repeat their code: nothing is computed or allocated. As in
# `flops`, matrix products only, and convolutions, which are sums of them.


def product_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Counts the products of one call: 2 for every multiplication that is added up.

    A loop counts as often as it runs, of alternatives the most expensive one. A convolution counts
    its whole kernel at every output, also where it meets the zeros around its input.

    Args:
      function: of arrays, to arrays.
      arguments: arrays, or `jax.ShapeDtypeStruct`s in their place.

    Raises:
      ValueError: if the number of a loop's iterations is not known from the trace.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> float:
    return sum((_of_equation(equation) for equation in jaxpr.eqns), 0.0)


def _of_equation(equation: Any) -> float:
    inner = [_of_jaxpr(jaxpr) for jaxpr in _jaxprs(equation.params)]
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            return 2.0 * _size(equation) * math.prod(shape[axis] for axis in contracted)
        case "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            kernel = equation.invars[1].aval.shape
            # The second entry is the inputs of one group.
            taps = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
            return 2.0 * _size(equation) * taps
        case "scan":
            return equation.params["length"] * sum(inner)
        case "cond":
            return max(inner)
        case "while":
            if sum(inner):
                raise ValueError(
                    "a loop whose number of iterations is data has no count; count one iteration"
                )
            return 0.0
        case "pallas_call":
            raise ValueError("a kernel written in Pallas has no count; trace the XLA one")
    return sum(inner, 0.0)


def _size(equation: Any) -> int:
    return math.prod(equation.outvars[0].aval.shape)


def _jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The functions that an equation calls."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
