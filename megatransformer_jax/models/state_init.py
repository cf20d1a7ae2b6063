"""The first state of the recurrence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.nn.embedding import embedding_scale
from megatransformer_jax.nn.parameters import truncated_normal, weight_init


def initial_state(
    config: ModelConfig, key: Key[Array, ""] | None, injected: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """The state before the first iteration, as `recurrence.state_init` says.

    Args:
      config: the model.
      key: randomness; 'zero' and 'none' need none.
      injected: the embedding that every iteration is given, [B, T, core width].

    Returns:
      An array like `injected`.

    Raises:
      ValueError: if a kind that needs a key has none.
    """
    kind, shape, dtype = config.recurrence.state_init, injected.shape, injected.dtype
    if kind == "zero":
        return jnp.zeros(shape, dtype)
    if kind == "none":
        return injected
    if key is None:
        raise ValueError(f"state_init={kind!r} draws the state at random; give a key")
    match kind:
        case "normal":
            return jax.random.normal(key, shape).astype(dtype)
        case "embed":
            return (jax.random.normal(key, shape) / jnp.sqrt(shape[-1])).astype(dtype)
        case "unit":
            state = jax.random.normal(key, shape)
            state = state - jnp.mean(state, axis=-1, keepdims=True)
            return (state / jnp.std(state, axis=-1, keepdims=True)).astype(dtype)
        case "like_init":
            std = weight_init(config, config.core_width).embedding_std
            state = truncated_normal(std)(key, shape, jnp.float32)
            return (state * embedding_scale(config)).astype(dtype)
    raise ValueError(f"unknown state_init {kind!r}")
