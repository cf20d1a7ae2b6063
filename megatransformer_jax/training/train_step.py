"""One optimiser step as a pure function of (state, batch)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.tokens import TokenLoss
from megatransformer_jax.models.adaptation import model_params
from megatransformer_jax.models.core import draw_num_steps
from megatransformer_jax.models.media.parts import sequence_room
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.training.accumulation import sum_micro_batches
from megatransformer_jax.training.media_term import count_media
from megatransformer_jax.training.objective import ObjectiveSums, Place, make_objective
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.step_keys import step_keys
from megatransformer_jax.training.trainable import join_params, split_params
from megatransformer_jax.training.update import Metrics, update_state
from megatransformer_jax.types import Batch

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    model: MegaTransformer, optimizer: optax.GradientTransformation, config: RunConfig
) -> TrainStep:
    """Builds the step; jit it with a donated state.

    The step draws the depth, sums gradients over `train.accumulation` micro-batches, and updates.
    If the loss or any gradient is not finite, parameters and optimiser state stay as they were and
    the step is counted as skipped.

    Only what `fine_tuning` trains has gradients; frozen parameters come out as they went in.

    Metrics are float32 scalars: loss, accuracy (of tokens), grad_norm (before clipping), num_steps
    (mean of the draws), tokens (that counted), skipped_steps, skipped_in_row,
    the objective's other terms, and with media the batch's counts of them (`MediaCounts`).
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = step_keys(state.key(), state.step)
        num_steps = draw_num_steps(
            config.model.recurrence, keys.depth, state.step, *_sequence_shape(config, batch)
        )
        gradients, (totals, terms) = _gradients(
            model, config, state.params, batch, num_steps, keys.objective, state.step
        )
        new_state, metrics = update_state(
            state,
            gradients,
            _mean_loss(totals, config.train.z_loss) + terms.get("media_loss", 0.0),
            optimizer,
            fine_tuning=config.fine_tuning,
            statistics_momentum=config.model.mlp.peer.query_momentum,
        )
        metrics |= {
            "accuracy": totals.correct / jnp.maximum(totals.tokens, 1),
            "num_steps": jnp.mean(num_steps.astype(jnp.float32)),
            "tokens": totals.tokens,
            **terms,
        }
        if batch.media is not None:
            metrics |= count_media(batch.media)._asdict()
        return new_state, metrics

    return train_step


def _gradients(
    model: MegaTransformer,
    config: RunConfig,
    params: Any,
    batch: Batch,
    num_steps: jax.Array,
    key: jax.Array,
    step: jax.Array,
) -> tuple[Any, ObjectiveSums]:
    """Gradients of the objective over the whole batch for the trained ones of `params`, and its
    sums."""
    trained, frozen = split_params(params, config.fine_tuning)
    parts = config.train.accumulation
    media = None if batch.media is None else count_media(batch.media)
    place = Place(step, jnp.maximum(jnp.sum(batch.loss_mask), 1.0), 1 / parts, media)
    objective = make_objective(model, config)

    def loss_share(
        trained: Any, part: Batch, draws: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, ObjectiveSums]:
        params = model_params(join_params(trained, frozen), config.fine_tuning)
        return objective(params, part, draws, key, place)

    differentiate = jax.grad(loss_share, has_aux=True)

    def of_part(inputs: tuple[Batch, jax.Array], key: jax.Array) -> tuple[Any, ObjectiveSums]:
        return differentiate(trained, *inputs, key)

    return sum_micro_batches(of_part, (batch, num_steps), key, parts)


def _mean_loss(totals: TokenLoss, z_loss: float) -> jax.Array:
    weighted = totals.cross_entropy + z_loss * totals.squared_log_normalizer
    return weighted / jnp.maximum(totals.tokens, 1.0)


def _sequence_shape(config: RunConfig, batch: Batch) -> tuple[int, int]:
    """Rows and places of the sequences that the core reads."""
    num_rows, length = batch.tokens.shape
    if batch.media is not None:
        length += sequence_room(config.model, batch.media)
    return num_rows, length
