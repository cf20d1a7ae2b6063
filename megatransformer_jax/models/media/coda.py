"""From the core's latents to what a decoder of media is conditioned on: protocol and codas.

The text's coda is the stack of `model.coda_layers` layers and the head (models/megatransformer.py):
it reads every place. A medium's coda reads the places before the medium alone, since those are all
that there is when the medium is to be made.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from megatransformer_jax.config.audio import AudioConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.nn.attention import CrossAttention
from megatransformer_jax.nn.block import Stack
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.nn.conv import FAN_IN
from megatransformer_jax.nn.norms import Norm
from megatransformer_jax.nn.parameters import vector, weight_init
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import alibi_slopes, rotary_table
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


@runtime_checkable
class Coda(Protocol):
    """A Flax module from latents to a decoder's condition."""

    def __call__(
        self, latents: Float[Array, "N C D"], exists: Bool[Array, "N C"], deterministic: bool
    ) -> Condition:
        """Conditions of N media, each from its own window; nothing else reaches it.

        Args:
          latents: the core's output at the C places that end with the opening token.
          exists: which places there are; the others never change the result.
          deterministic: no dropout.
        """
        ...


def build_coda(
    config: ModelConfig,
    medium: ImageConfig | AudioConfig,
    policy: DTypePolicy,
    sharder: Sharder,
    platform: str,
) -> Coda:
    """The coda that the options of a medium ask for.

    Args:
      config: of the model.
      medium: `config.image` or `config.audio`.
      policy: types.
      sharder: places what is cut over devices.
      platform: of the devices: 'cpu', 'gpu' or 'tpu'.
    """
    parts = (policy, sharder, platform)
    if medium.coda_queries is None:
        return WindowCoda(config, medium.coda_layers, *parts)
    # Without a parent here: it becomes part of what it is given to.
    window = WindowCoda(config, medium.coda_layers, *parts, parent=None)
    return QueryCoda(window, medium.coda_queries, policy)


class WindowCoda(nn.Module):
    """Layers without causality over the window, and a norm.

    `num_layers` may be 0. Positions within the window are told to rotary and ALiBi layers; learned
    and sinusoidal ones are in the latents already.
    """

    config: ModelConfig
    num_layers: int
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    @nn.compact
    def __call__(
        self, latents: Float[Array, "N C D"], exists: Bool[Array, "N C"], deterministic: bool
    ) -> Condition:
        """See `Coda`."""
        config = self.config
        x = Stack(
            side_stack_config(config),
            tuple(range(self.num_layers)),
            weight_init(config, config.width),
            self.policy,
            self.sharder,
            self.platform,
            config.remat,
            name="layers",
        )(latents, side_context(config, exists, deterministic))
        x = Norm(config.norm, name="norm")(x)
        return Condition(jnp.where(exists[..., None], x, 0), exists)


class QueryCoda(nn.Module):
    """Learned queries that gather what another coda says of the window (a Perceiver resampler,
    arXiv 2204.14198, of one layer).

    Attributes:
      window: says something of every place.
      num_queries: Q, vectors of the condition.
      policy: types.
    """

    window: WindowCoda
    num_queries: int
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, latents: Float[Array, "N C D"], exists: Bool[Array, "N C"], deterministic: bool
    ) -> Condition:
        """See `Coda`; conditions of Q vectors."""
        config, count = self.window.config, latents.shape[0]
        places = self.window(latents, exists, deterministic)
        shape = (self.num_queries, config.width)
        queries = vector(self, "queries", nn.initializers.normal(1.0), shape)
        queries = jnp.broadcast_to(queries.astype(places.context.dtype), (count, *shape))
        attend = CrossAttention(
            config.head_dim(config.width), self.policy, output_init=FAN_IN, name="gather"
        )
        x = queries + attend(queries, places.context, exists)
        x = Norm(config.norm, name="norm")(x)
        # Queries say nothing where there is nothing to gather.
        is_context = jnp.broadcast_to(jnp.any(exists, axis=1)[:, None], x.shape[:2])
        return Condition(jnp.where(is_context[..., None], x, 0), is_context)


def side_stack_config(config: ModelConfig) -> ModelConfig:
    """The model's config for a short stack next to the main path: every place seen, as any batch
    comes, each layer with weights of its own."""
    attention = dataclasses.replace(config.attention, window=None, kernel="xla")
    return dataclasses.replace(config, attention=attention, scan_layers=False)


def side_context(
    config: ModelConfig, exists: Bool[Array, "N C"], deterministic: bool
) -> LayerContext:
    """What the layers of a stack share that sees all existing places of each row, both ways."""
    segment_ids = exists.astype(jnp.int32)
    mask = AttentionMask(
        is_causal=False, query_segment_ids=segment_ids, key_segment_ids=segment_ids
    )
    places = jnp.broadcast_to(jnp.arange(exists.shape[1]), exists.shape)
    rotary, slopes = None, None
    match config.positions.scheme:
        case "rotary":
            width = config.head_dim(config.width)
            base, scaling = config.positions.rotary_base, config.positions.scaling
            rotary = rotary_table(places, width, base, scaling)
        case "alibi":
            slopes = alibi_slopes(config.attention.num_heads)
    return LayerContext(mask, rotary, slopes, None, deterministic)
