"""Start of a run with `model.residual='admin'`: a profiling pass over its first batch."""

from typing import Any

import jax
import optax
from absl import logging

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.batches import Pipeline
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.observed import profile_admin
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.distributed import make_global_batch
from megatransformer_jax.training.state import TrainState, init_state
from megatransformer_jax.training.trainable import path_text
from megatransformer_jax.types import Batch


def first_batch(batches: Pipeline, sharder: Sharder) -> Batch:
    """The batch that the pipeline gives next, which it will give again."""
    start = batches.get_state()
    batch = make_global_batch(next(batches), sharder)
    batches.set_state(start)
    return batch


def admin_state(
    config: RunConfig,
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    batch: Batch,
) -> TrainState:
    """A state at step 0 whose omegas are as `profile_admin` says; they are logged.

    Args:
      config: of the run.
      model: with `residual='admin'`.
      optimizer: of the run; it starts from the profiled parameters.
      shardings: of the state.
      batch: the first one.
    """

    def initialise(key: jax.Array, batch: Batch) -> TrainState:
        # A stream that neither the weights nor a training step draw from.
        profile_key = jax.random.fold_in(key, 2**32 - 2)

        def adjust(params: Any) -> Any:
            inputs = (batch.tokens, batch.positions, batch.segment_ids)
            return profile_admin(model, params, *inputs, profile_key)

        return init_state(model, optimizer, key, adjust, fine_tuning=config.fine_tuning)

    state = jax.jit(initialise, out_shardings=shardings)(jax.random.key(config.train.seed), batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = path_text(path).replace("/", ".")
        if name.endswith("_residual_scale"):
            logging.info("admin: %s starts at %.4g", name, float(leaf[0]))
    return state
