"""How many iterations the steps of training drew."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from megatransformer_jax.config.model import RecurrenceConfig
from megatransformer_jax.models.core import draw_num_steps
from megatransformer_jax.training.step_keys import step_keys


def count_draws(
    config: RecurrenceConfig,
    run_key: Key[Array, ""],
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
    batch_size: int,
    length: int,
) -> Int[Array, "max_steps"]:
    """How often each number of iterations was drawn, entry i - 1 for i of them.

    Nothing was recorded: a draw depends on the run's key and its step alone, so it is made again.

    Args:
      config: distribution and what gets a draw of its own.
      run_key: of the train state.
      first: number of the first step that counts, from 1; traced.
      last: number of the last one.
      batch_size: B, for draws per sequence or token.
      length: T, for draws per token.
    """

    def add(step: jax.Array, counts: jax.Array) -> jax.Array:
        depth_key = step_keys(run_key, step).depth
        draws = draw_num_steps(config, depth_key, step, batch_size, length)
        return counts + jnp.bincount(draws.reshape(-1) - 1, length=config.max_steps)

    # Step n is made after n - 1 others.
    counts = jnp.zeros(config.max_steps, jnp.int32)
    return jax.lax.fori_loop(jnp.asarray(first) - 1, jnp.asarray(last), add, counts)
