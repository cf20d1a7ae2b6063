"""How long a clip should be, from what the core says before it."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.nn.conv import ZEROS, Dense
from megatransformer_jax.nn.norms import rms_normalize
from megatransformer_jax.nn.parameters import vector
from megatransformer_jax.types import DTypePolicy

EPS = 1e-6


class DurationHead(nn.Module):
    """The logarithm of a clip's frames, by one hidden layer over the mean of the condition's
    vectors and the last of them. Starts at half of `max_frames`; without any vector it is a learned
    number."""

    max_frames: int
    policy: DTypePolicy

    @nn.compact
    def __call__(self, condition: Condition) -> Float[Array, "N"]:
        """Log frames, float32."""
        context, is_context = condition.context, condition.is_context
        width = context.shape[-1]
        scale = vector(self, "scale", nn.initializers.ones, (width,))
        x = jnp.where(is_context[..., None], context.astype(jnp.float32), 0.0)
        x = rms_normalize(x, scale, EPS)
        count = jnp.sum(is_context, axis=1, keepdims=True)
        mean = jnp.sum(x, axis=1) / jnp.maximum(count, 1)
        places = jnp.arange(1, x.shape[1] + 1)
        last = jnp.argmax(jnp.where(is_context, places, 0), axis=1)
        at_last = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        pooled = jnp.concatenate((mean, at_last), axis=-1)
        h = jax.nn.silu(Dense(width, self.policy, name="hidden")(pooled))
        log_frames = Dense(1, self.policy, kernel_init=ZEROS, bias=False, name="out")(h)[:, 0]
        start = nn.initializers.constant(math.log(max(self.max_frames / 2, 1)))
        return log_frames.astype(jnp.float32) + vector(self, "bias", start, ())


def duration_error(log_frames: Float[Array, "N"], lengths: Int[Array, "N"]) -> Float[Array, "N"]:
    """(log_frames - ln lengths)^2; 0 for clips of no frames."""
    error = jnp.square(log_frames - jnp.log(jnp.maximum(lengths, 1)))
    return jnp.where(lengths > 0, error, 0.0)


def whole_frames(log_frames: Float[Array, "N"], max_frames: int) -> Int[Array, "N"]:
    """The nearest number of frames, from 1 to `max_frames`."""
    frames = jnp.exp(jnp.clip(log_frames, 0.0, math.log(max_frames)))
    return jnp.clip(jnp.round(frames), 1, max_frames).astype(jnp.int32)
