"""Memory of a model, from shapes alone: nothing is allocated.

What a training step keeps for its backward pass is not modelled by a formula but read off JAX's
own linearisation, traced on abstract arrays, so it follows every option of the architecture
(`residuals.py`). What the compiler makes of it is estimated; the tests say how well.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.cost.residuals import LOOP_LENGTH, TPU_LANES, KeptBytes, kept_bytes
from megatransformer_jax.models.megatransformer import MegaTransformer, abstract_params
from megatransformer_jax.nn.kv_cache import pair_width
from megatransformer_jax.types import MediaBatch


@dataclasses.dataclass(frozen=True)
class ActivationMemory:
    """Bytes that a training step holds between forward and backward pass. Estimates.

    They do not depend on the number of iterations, only on how many of them have gradients.

    Attributes:
      once: kept outside the gradient iterations: prelude, coda, copies of weights in another type.
      per_iteration: kept for each iteration with gradients.
      one_iteration: held while the gradients of one iteration are computed, those of the core's
        weights included that are summed over iterations in another type than the parameters'.
      logits: float32 logits, and what else is there when their gradient is computed.
      after_loop: the part of `once` that is let go before the loop's backward pass.
      weights: the part of `once` that are copies of weights.
    """

    once: int
    per_iteration: int
    one_iteration: int
    logits: int
    after_loop: int
    weights: int

    def total(self, backprop_depth: int) -> int:
        """The most of it at one time, with gradients through this many iterations."""
        kept = self.once + backprop_depth * self.per_iteration
        return max(kept + self.logits, kept - self.after_loop + self.one_iteration)


def activation_memory(
    model: MegaTransformer,
    rows: int,
    length: int,
    media: MediaBatch | None = None,
    learned: tuple[int, int] = (0, 0),
    tensor: int = 1,
) -> ActivationMemory:
    """Estimates what one (micro-)batch of [rows, length] tokens keeps for the backward pass.

    Args:
      model: as trained. Its platform decides the attention kernel: XLA's keeps attention weights,
        [N, T, S] per row, fused ones do not; and what its compiler computes again by itself.
      rows: on one device.
      length: on one device.
      media: shapes of the batch's images and sound on one device, whose encoders and codas count
        as well.
      learned: images and clips on one device that decoders compute.
      tensor: devices of the mesh axis of this name, over which heads, hidden units and vocabulary
        are cut.
    """
    model = model.copy(config=_share(model.config, tensor))
    config = model.config
    kept = _kept(model, rows, length, media, learned)
    layers = max(1, config.prelude_layers + config.coda_layers)
    whole = kept
    if config.remat != "none":
        plain = model.copy(config=dataclasses.replace(config, remat="none"))
        whole = _kept(plain, rows, length, media, learned)
    if config.remat == "offload":
        one = rows * length * model.policy.compute.itemsize
        kept = dataclasses.replace(
            kept,
            once=max(0, kept.once - one * config.width * layers),
            per_iteration=max(0, kept.per_iteration - one * config.state_width),
        )
    logits = rows * length * config.vocab_size
    float32, compute = jnp.dtype(jnp.float32).itemsize, model.policy.compute.itemsize
    if model.platform == "cpu":
        # Outside of loops CPU's compiler moves most of what is computed again in front of the
        # backward pass; measured, a quarter of what remat could save is saved.
        once = kept.once
        if not config.scan_layers:
            once = (3 * whole.once + kept.once) // 4
        at_once, after_loop = whole.per_iteration, once * config.coda_layers // layers
        return ActivationMemory(
            once,
            kept.per_iteration,
            at_once,
            logits * (float32 + compute),
            after_loop,
            kept.weights,
        )
    # Values of the iteration in hand are copied out of the long arrays; without remat a layer's.
    at_once = whole.one_iteration + kept.per_iteration
    if config.remat == "none":
        at_once = kept.per_iteration // max(1, config.core_layers)
    if model.policy.compute != model.policy.param:
        at_once += _core_size(model) * compute
    # Behind a core the gradient of the logits is stored; otherwise the head's products compute it.
    head = logits * compute if config.is_recurrent else config.vocab_size * config.width * float32
    return ActivationMemory(
        once=kept.once,
        per_iteration=kept.per_iteration,
        one_iteration=at_once,
        logits=logits * float32 + head,
        after_loop=(kept.once - kept.weights) * config.coda_layers // layers,
        weights=kept.weights,
    )


def _share(config: ModelConfig, tensor: int) -> ModelConfig:
    """A model with the sizes that one device of the mesh axis `tensor` has.

    Heads stay whole where layers of two widths have heads of two widths, and so do the decoders of
    images and sound.
    """
    if tensor == 1:
        return config
    attention, mlp, head_dim = config.attention, config.mlp, config.head_dim(config.width)
    if head_dim == config.head_dim(config.core_width):
        attention = dataclasses.replace(
            attention,
            num_heads=-(-attention.num_heads // tensor),
            num_kv_heads=-(-attention.kv_heads // tensor),
            head_dim=head_dim,
        )
    if mlp.kind != "peer":
        mlp = dataclasses.replace(mlp, hidden_width=-(-mlp.hidden_width // tensor))
    vocab_size = -(-config.vocab_size // tensor)
    return dataclasses.replace(config, vocab_size=vocab_size, attention=attention, mlp=mlp)


def _core_size(model: MegaTransformer) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model).get("core", ())))


def cache_bytes_per_token(
    config: ModelConfig, depth: int, dtype: jnp.dtype, platform: str = "cpu"
) -> int:
    """Bytes of keys and values that one token adds to a full cache.

    A full cache has a slot for every layer of prelude and coda, and for every core layer in each of
    the `depth` iterations. On a TPU heads whose width is not a multiple of 64 take more than their
    numbers, see `nn.kv_cache.pair_width`.
    """
    outer = (config.prelude_layers + config.coda_layers) * _pair(config, config.width, platform)
    inner = depth * config.core_layers * _pair(config, config.core_width, platform)
    return config.attention.kv_heads * (outer + inner) * jnp.dtype(dtype).itemsize


def _pair(config: ModelConfig, width: int, platform: str) -> int:
    return pair_width(config.head_dim(width), platform)


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes; of a leaf with a sharding, what one device holds."""
    return sum(_bytes(_shard_shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(tree))


def _shard_shape(leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)


def _kept(
    model: MegaTransformer,
    rows: int,
    length: int,
    media: MediaBatch | None,
    learned: tuple[int, int],
) -> KeptBytes:
    """Bytes that the forward pass hands to the backward pass, without the parameters."""
    config = model.config
    # Laying out several iterations per turn changes no residual, but must fit the depth. Groups of
    # iterations keep fewer of the same states, and offloaded ones are subtracted. The implicit
    # gradient keeps what one iteration of this loop does.
    recurrence = dataclasses.replace(
        config.recurrence, unroll=1, kept_every=1, gradient="truncated", implicit_tolerance=0.0
    )
    remat = "full" if config.remat == "offload" else config.remat
    model = model.copy(config=dataclasses.replace(config, recurrence=recurrence, remat=remat))

    def outputs(
        params: Any,
        tokens: jax.Array,
        segment_ids: jax.Array,
        num_steps: jax.Array,
        media: MediaBatch | None,
    ) -> Any:
        keys = jax.random.split(jax.random.key(0), 3)
        output: Any = model.apply(
            {"params": params},
            tokens,
            segment_ids=segment_ids,
            num_steps=num_steps,
            backprop_depth=LOOP_LENGTH,
            deterministic=False,
            rngs={"state": keys[0], "dropout": keys[1]},
            media=media,
        )
        if media is None:
            return output.logits
        losses = _media_losses(model, params, media, output.conditions, learned, keys[2])
        return output.logits, losses

    integers = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    draw = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (abstract_params(model), integers, integers, draw, media)
    lanes = TPU_LANES if model.platform == "tpu" else 1
    return kept_bytes(outputs, *arguments, fuses=model.platform != "cpu", lanes=lanes)


def _media_losses(
    model: MegaTransformer,
    params: Any,
    media: MediaBatch,
    conditions: Any,
    learned: tuple[int, int],
    key: jax.Array,
) -> list[Any]:
    """What the decoders' training minimises; any media will do. None of those without a target."""
    losses: list[Any] = []
    num_images, num_clips = learned

    def first(count: int, *trees: Any) -> Any:
        return jax.tree.map(lambda array: array[:count], trees)

    if media.images is not None and num_images:
        images = media.images.reshape(-1, *media.images.shape[2:])
        arguments = first(num_images, images, conditions["image"])
        losses.append(model.apply({"params": params}, *arguments, key, method="image_loss"))
    if media.mels is not None and num_clips:
        mels, lengths = media.mels.reshape(-1, *media.mels.shape[2:]), media.mel_lengths.reshape(-1)
        arguments = first(num_clips, mels, lengths, conditions["audio"])
        losses.append(model.apply({"params": params}, *arguments, key, method="audio_loss"))
    return [terms["loss"] for terms in losses]


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return size
