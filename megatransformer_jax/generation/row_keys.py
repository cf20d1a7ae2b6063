"""Keys of draws: every text has its own, whatever else is generated beside it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key


def prompt_keys(seed: int, numbers: Sequence[int]) -> Key[Array, "B"]:
    """A key per prompt; which batch it is in does not matter."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(jax.random.key(seed), jnp.asarray(numbers, jnp.int32))


def sample_keys(prompt_keys: Key[Array, "B"], count: int) -> Key[Array, "B2"]:
    """A key per text. The first text of a prompt has the same whatever `num_samples` is."""
    split = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count)))
    return split(prompt_keys).reshape(-1)
