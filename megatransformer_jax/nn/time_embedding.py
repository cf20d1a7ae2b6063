"""What a denoising network knows besides the noisy medium: the time, and what to make."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from megatransformer_jax.nn.conv import Dense
from megatransformer_jax.nn.norms import rms_normalize
from megatransformer_jax.nn.parameters import vector
from megatransformer_jax.types import DTypePolicy

# Times in [0, 1] become angles of 0 to 1000, as if there were a thousand steps.
TIME_SCALE = 1000.0
LONGEST_PERIOD = 10_000.0
CONTEXT_EPS = 1e-6


def sinusoidal_time(time: Float[Array, "N"], width: int) -> Float[Array, "N D"]:
    """cos(1000 t f_i), then sin(1000 t f_i), f_i = 10000^(-2i/D), i = 0 ... D/2 - 1; float32.

    Raises:
      ValueError: if D is odd.
    """
    if width % 2:
        raise ValueError(f"width is {width}; the embedding of the time needs an even width.")
    exponents = jnp.arange(width // 2) * (-2.0 / width)
    frequencies = jnp.exp(exponents * math.log(LONGEST_PERIOD))
    angles = TIME_SCALE * time.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate((jnp.cos(angles), jnp.sin(angles)), axis=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time through a network with one hidden layer."""

    width: int
    policy: DTypePolicy

    @nn.compact
    def __call__(self, time: Float[Array, "N"]) -> Float[Array, "N D"]:
        """Embeds times in [0, 1]."""
        x = sinusoidal_time(time, self.width)
        x = jax.nn.silu(Dense(self.width, self.policy, name="hidden")(x))
        return Dense(self.width, self.policy, name="out")(x)


class ConditionEmbedding(nn.Module):
    """A vector of the time and of what to make, and the context for cross-attention.

    Of the context the vector has the last one that there is: after a causal core it has seen all
    others. In the place of no context at all comes a learned vector.
    """

    width: int
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self,
        time: Float[Array, "N"],
        context: Float[Array, "N C D"],
        is_context: Bool[Array, "N C"],
    ) -> tuple[Float[Array, "N D2"], Float[Array, "N C D"]]:
        """Returns the vector, and the context normalised, zero where there is none."""
        scale = vector(self, "context_scale", nn.initializers.ones, context.shape[-1:])
        context = jnp.where(is_context[..., None], context.astype(self.policy.compute), 0)
        context = rms_normalize(context, scale, CONTEXT_EPS)
        places = jnp.arange(1, context.shape[1] + 1)
        last = jnp.argmax(jnp.where(is_context, places, 0), axis=1)
        last_context = jnp.take_along_axis(context, last[:, None, None], axis=1)[:, 0]
        said = Dense(self.width, self.policy, name="context")(last_context)
        nothing = vector(self, "null_embedding", nn.initializers.zeros, (self.width,))
        is_any = jnp.any(is_context, axis=1)[:, None]
        embedding = TimeEmbedding(self.width, self.policy, name="time")(time)
        return embedding + jnp.where(is_any, said, nothing.astype(said.dtype)), context
