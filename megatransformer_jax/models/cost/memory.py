"""Memory of a model, from shapes alone: nothing is allocated.

What a training step keeps for its backward pass is not modelled by a formula but read off JAX's
own linearisation, traced on abstract arrays, so it follows every option of the architecture. The
compiler then fuses and reuses, so the numbers remain estimates (see the test for how close).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.cost.parameter_counts import abstract_params
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import MediaBatch


@dataclasses.dataclass(frozen=True)
class ActivationMemory:
    """Bytes that a training step holds between forward and backward pass. Estimates.

    They do not depend on the number of iterations, only on how many of them have gradients.

    Attributes:
      once: kept outside the gradient iterations: prelude, coda, copies of weights in another type.
      per_iteration: kept for each iteration with gradients.
      recomputed: held while one iteration (or layer, without a core) is rematerialised.
      logits: float32 logits and their gradient.
    """

    once: int
    per_iteration: int
    recomputed: int
    logits: int

    def total(self, backprop_depth: int) -> int:
        """All of it, with gradients through this many iterations."""
        return self.once + backprop_depth * self.per_iteration + self.recomputed + self.logits


def activation_memory(
    model: MegaTransformer,
    rows: int,
    length: int,
    media: MediaBatch | None = None,
    learned: tuple[int, int] = (0, 0),
) -> ActivationMemory:
    """Estimates what one (micro-)batch of [rows, length] tokens keeps for the backward pass.

    Args:
      model: as trained. Its platform decides the attention kernel: XLA's keeps attention weights,
        [N, T, S] per row, fused ones do not.
      rows: on one device.
      length: on one device.
      media: shapes of the batch's images and sound on one device, whose encoders and codas count
        as well.
      learned: images and clips on one device that decoders compute.
    """
    config = model.config
    logits = 2 * rows * length * config.vocab_size * jnp.dtype(jnp.float32).itemsize
    once, per_iteration = _kept(model, rows, length, media, learned)
    if config.remat == "none":
        return ActivationMemory(once, per_iteration, 0, logits)
    plain = model.copy(config=dataclasses.replace(config, remat="none"))
    plain_once, plain_per_iteration = _kept(plain, rows, length, media, learned)
    if config.is_recurrent:
        recomputed = plain_per_iteration - per_iteration
    else:
        recomputed = (plain_once - once) // (config.prelude_layers + config.coda_layers)
    return ActivationMemory(once, per_iteration, recomputed, logits)


def cache_bytes_per_token(config: ModelConfig, depth: int, dtype: jnp.dtype) -> int:
    """Bytes of keys and values that one token adds to a full cache.

    A full cache has a slot for every layer of prelude and coda, and for every core layer in each of
    the `depth` iterations.
    """
    outer = (config.prelude_layers + config.coda_layers) * config.head_dim(config.width)
    inner = depth * config.core_layers * config.head_dim(config.core_width)
    return 2 * config.attention.kv_heads * (outer + inner) * jnp.dtype(dtype).itemsize


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
) -> tuple[int, int]:
    """Residual bytes outside the gradient iterations, and those of each of them."""
    if not model.config.is_recurrent:
        return _residual_bytes(model, rows, length, 1, media, learned), 0
    one, two = (_residual_bytes(model, rows, length, n, media, learned) for n in (1, 2))
    return 2 * one - two, two - one


def _residual_bytes(
    model: MegaTransformer,
    rows: int,
    length: int,
    backprop_depth: int,
    media: MediaBatch | None,
    learned: tuple[int, int],
) -> int:
    """Bytes that the forward pass hands to the backward pass, without the parameters."""
    config = model.config
    # Laying out several iterations per turn changes no residual, but must fit the depth.
    recurrence = dataclasses.replace(config.recurrence, unroll=1)
    model = model.copy(config=dataclasses.replace(config, recurrence=recurrence))
    integers = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    sizes: list[int] = []

    def trace(
        params: Any,
        tokens: jax.Array,
        segment_ids: jax.Array,
        num_steps: jax.Array,
        media: MediaBatch | None,
    ) -> None:
        keys = jax.random.split(jax.random.key(0), 3)

        def outputs(params: Any) -> Any:
            output: Any = model.apply(
                {"params": params},
                tokens,
                segment_ids=segment_ids,
                num_steps=num_steps,
                backprop_depth=backprop_depth,
                deterministic=False,
                rngs={"state": keys[0], "dropout": keys[1]},
                media=media,
            )
            if media is None:
                return output.logits
            return output.logits, _media_losses(
                model, params, media, output.conditions, learned, keys[2]
            )

        _, backward = jax.vjp(outputs, params)
        given = {id(leaf) for leaf in jax.tree.leaves((params, tokens, segment_ids, media))}
        # The function is a pytree of its residuals; one array may stand in several places.
        kept = {id(leaf): leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in given}
        sizes.extend(_bytes(leaf.shape, leaf.dtype) for leaf in kept.values())

    draw = jax.ShapeDtypeStruct((), jnp.int32)
    jax.eval_shape(trace, abstract_params(model), integers, integers, draw, media)
    return sum(sizes)


def _media_losses(
    model: MegaTransformer,
    params: Any,
    media: MediaBatch,
    conditions: Any,
    learned: tuple[int, int],
    key: jax.Array,
) -> list[Any]:
    """What the decoders' training minimises; any media will do."""
    losses: list[Any] = []
    num_images, num_clips = learned

    def first(count: int, *trees: Any) -> Any:
        return jax.tree.map(lambda array: array[:count], trees)

    if media.images is not None:
        images = media.images.reshape(-1, *media.images.shape[2:])
        arguments = first(num_images, images, conditions["image"])
        losses.append(model.apply({"params": params}, *arguments, key, method="image_loss"))
    if media.mels is not None:
        mels, lengths = media.mels.reshape(-1, *media.mels.shape[2:]), media.mel_lengths.reshape(-1)
        arguments = first(num_clips, mels, lengths, conditions["audio"])
        losses.append(model.apply({"params": params}, *arguments, key, method="audio_loss"))
    return [terms["loss"] for terms in losses]


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return size
