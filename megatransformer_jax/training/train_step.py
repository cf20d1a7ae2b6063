"""One optimiser step as a pure function of (state, batch)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.cross_entropy import TokenLoss
from megatransformer_jax.models.fine_tuned import model_params
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.step_schedule import draw_num_steps
from megatransformer_jax.training.objective import ObjectiveSums, Place, make_objective
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.statistics import update_statistics, without_statistics
from megatransformer_jax.training.step_keys import step_keys
from megatransformer_jax.training.trainable import join_params, split_params
from megatransformer_jax.types import Batch

Metrics = dict[str, jax.Array]
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
    and the objective's other terms.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = step_keys(state.key(), state.step)
        num_steps = draw_num_steps(
            config.model.recurrence, keys.depth, state.step, *batch.tokens.shape
        )
        gradients, (totals, terms) = _gradients(
            model, config, state.params, batch, num_steps, keys.objective, state.step
        )
        loss = _mean_loss(totals, config.train.z_loss)
        reports, gradients = gradients, without_statistics(gradients)
        norm = optax.tree.norm(gradients)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        trained, frozen = split_params(state.params, config.fine_tuning)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        momentum = config.model.mlp.peer.query_momentum
        new_trained = optax.apply_updates(trained, updates)
        new_trained = update_statistics(new_trained, trained, reports, momentum)
        new_trained = _choose(is_finite, new_trained, trained)
        skipped = jnp.where(is_finite, 0, 1).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=join_params(new_trained, frozen),
            opt_state=_choose(is_finite, opt_state, state.opt_state),
            key_data=state.key_data,
            skipped_steps=state.skipped_steps + skipped,
            skipped_in_row=(state.skipped_in_row + 1) * skipped,
        )
        metrics = {
            "loss": loss,
            "accuracy": totals.correct / jnp.maximum(totals.tokens, 1),
            "grad_norm": norm,
            "num_steps": jnp.mean(num_steps.astype(jnp.float32)),
            "tokens": totals.tokens,
            "skipped_steps": new_state.skipped_steps.astype(jnp.float32),
            "skipped_in_row": new_state.skipped_in_row.astype(jnp.float32),
            **terms,
        }
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
    place = Place(step, jnp.maximum(jnp.sum(batch.loss_mask), 1.0), 1 / parts)
    objective = make_objective(model, config)

    def loss_share(
        trained: Any, part: Batch, draws: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, ObjectiveSums]:
        params = model_params(join_params(trained, frozen), config.fine_tuning)
        return objective(params, part, draws, key, place)

    differentiate = jax.grad(loss_share, has_aux=True)
    if parts == 1:
        return differentiate(trained, batch, num_steps, key)

    def add_part(carry: Any, inputs: tuple[Any, ...]) -> tuple[Any, None]:
        part, draws, index = inputs
        result = differentiate(trained, part, draws, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, result), None

    split = functools.partial(_split_rows, parts=parts)
    draws = split(num_steps) if num_steps.ndim else jnp.broadcast_to(num_steps, (parts,))
    zeros = jax.tree.map(
        jnp.zeros_like, jax.eval_shape(differentiate, trained, batch, num_steps, key)
    )
    inputs = (jax.tree.map(split, batch), draws, jnp.arange(parts))
    return jax.lax.scan(add_part, zeros, inputs)[0]


def _split_rows(array: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [parts, B/parts, ...], interleaved: each device keeps the rows that it holds."""
    rows = array.shape[0] // parts
    return array.reshape(rows, parts, *array.shape[1:]).swapaxes(0, 1)


def _mean_loss(totals: TokenLoss, z_loss: float) -> jax.Array:
    weighted = totals.cross_entropy + z_loss * totals.squared_log_normalizer
    return weighted / jnp.maximum(totals.tokens, 1.0)


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
