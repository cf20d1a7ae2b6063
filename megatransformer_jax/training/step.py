"""One optimiser step as a pure function of (state, batch), for any model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.config.fine_tuning import TRAIN_ALL, FineTuningConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.tokens import TokenLoss
from megatransformer_jax.models.adaptation import model_params
from megatransformer_jax.models.core import backprop_stage, draw_num_steps
from megatransformer_jax.models.media.parts import sequence_room
from megatransformer_jax.models.megatransformer import MegaTransformer, param_axes
from megatransformer_jax.nn.cut_matrices import Spread
from megatransformer_jax.training.objective import ObjectiveSums, Place, count_media, make_objective
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.trainable import (
    join_params,
    split_params,
    update_statistics,
    without_statistics,
)
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# The half of a training step after the gradients, the same whatever was differentiated.

Metrics = dict[str, jax.Array]


def update_state(
    state: TrainState,
    gradients: Any,
    loss: Float[Array, ""],
    optimizer: optax.GradientTransformation,
    *,
    fine_tuning: FineTuningConfig = TRAIN_ALL,
    statistics_momentum: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """The state after one step, and what the update itself has to report.

    If the loss or any gradient is not finite, parameters and optimiser state stay as they were and
    the step is counted as skipped. Frozen parameters come out as they went in.

    Args:
      state: before the step.
      gradients: of the trained parameters; those of running statistics are reports.
      loss: of the whole batch.
      optimizer: makes the updates; it clips.
      fine_tuning: which parameters are trained.
      statistics_momentum: of running statistics among the parameters, if there are any.

    Returns:
      The new state, and float32 scalars: loss, grad_norm (before clipping), skipped_steps,
      skipped_in_row.
    """
    reports, gradients = gradients, without_statistics(gradients)
    norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    trained, frozen = split_params(state.params, fine_tuning)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    new_trained = optax.apply_updates(trained, updates)
    new_trained = update_statistics(new_trained, trained, reports, statistics_momentum)
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
    return new_state, {
        "loss": loss,
        "grad_norm": norm,
        "skipped_steps": new_state.skipped_steps.astype(jnp.float32),
        "skipped_in_row": new_state.skipped_in_row.astype(jnp.float32),
    }


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


# ------------------------------------------------------------------------------
# The step of a transformer.

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
    spread = _spread(model, config, trained, batch.tokens.shape[0] // parts)

    copies = spread.copies(trained)

    def through(backprop_depth: int) -> tuple[Any, ObjectiveSums]:
        objective = make_objective(model, config, backprop_depth=backprop_depth)

        def loss_share(
            trained: Any, part: Batch, draws: jax.Array, key: jax.Array
        ) -> tuple[jax.Array, ObjectiveSums]:
            params = model_params(join_params(trained, frozen), config.fine_tuning)
            return objective(spread.matrices(params), part, draws, key, place)

        differentiate = jax.grad(loss_share, has_aux=True)

        def of_part(inputs: tuple[Batch, jax.Array], key: jax.Array) -> tuple[Any, ObjectiveSums]:
            return differentiate(copies, *inputs, key)

        return sum_micro_batches(of_part, (batch, num_steps), key, parts)

    recurrence = config.model.recurrence
    ways = [functools.partial(through, depth) for depth in recurrence.backprop_depths]
    if len(ways) == 1:
        gradients, sums = ways[0]()
    else:  # Only the one of the ramp's stage is computed.
        gradients, sums = jax.lax.switch(backprop_stage(recurrence, step), ways)
    return spread.summed(gradients, model.policy.compute), sums


def _spread(model: MegaTransformer, config: RunConfig, trained: Any, num_rows: int) -> Spread:
    """Matrices whose gradients are summed over the devices once per step, and not in the loops over
    micro-batches or groups of iterations.

    None of them without such loops, or where passes other than the model's own read the parameters,
    or LoRA changes them.
    """
    is_read_otherwise = (
        config.fine_tuning.lora.rank
        or config.model.exit_gate.enabled
        or config.train.supervision.prior != "none"
        or config.train.stability.jacobian_weight
    )
    has_loop = config.train.accumulation > 1 or config.model.recurrence.kept_every > 1
    if not has_loop or is_read_otherwise:
        return Spread(model.sharder, {})
    return Spread.of(trained, param_axes(model), model.sharder, num_rows)


def _mean_loss(totals: TokenLoss, z_loss: float) -> jax.Array:
    weighted = totals.cross_entropy + z_loss * totals.squared_log_normalizer
    return weighted / jnp.maximum(totals.tokens, 1.0)


def _sequence_shape(config: RunConfig, batch: Batch) -> tuple[int, int]:
    """Rows and places of the sequences that the core reads."""
    num_rows, length = batch.tokens.shape
    if batch.media is not None:
        length += sequence_room(config.model, batch.media)
    return num_rows, length


# ------------------------------------------------------------------------------
# The step of a model whose loss is a function of parameters, batch and key alone.

LossStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


@runtime_checkable
class Loss(Protocol):
    """Pure and differentiable in its first argument."""

    def __call__(
        self, params: Any, batch: Any, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The mean over the rows of the batch, and further means by the name of their metric."""


def make_loss_step(
    loss: Loss, optimizer: optax.GradientTransformation, accumulation: int = 1
) -> LossStep:
    """Builds the step; jit it with a donated state.

    Args:
      loss: what is minimised.
      optimizer: for the whole tree of parameters.
      accumulation: micro-batches that make one step; divides the rows of a batch.

    Returns:
      (state, batch) -> (state, metrics); metrics are those of `update_state` and of the loss.
    """

    def share(params: Any, part: Any, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        value, terms = loss(params, part, key)
        value, terms = jax.tree.map(lambda mean: mean / accumulation, (value, terms))
        return value, (value, terms)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        def of_part(part: Any, key: jax.Array) -> Any:
            return jax.grad(share, has_aux=True)(state.params, part, key)

        key = step_keys(state.key(), state.step).objective
        gradients, (value, terms) = sum_micro_batches(of_part, batch, key, accumulation)
        state, metrics = update_state(state, gradients, value, optimizer)
        return state, metrics | {name: jnp.float32(term) for name, term in terms.items()}

    return step


# ------------------------------------------------------------------------------
# Adds up what micro-batches give, one after the other, so that one at a time is in memory.


def sum_micro_batches(
    function: Callable[[Any, Key[Array, ""]], Any], inputs: Any, key: Key[Array, ""], parts: int
) -> Any:
    """The sum of `function(part, key of the part)` over `parts` micro-batches.

    Args:
      function: from a part of `inputs` and a key to a tree of arrays.
      inputs: tree of arrays [B, ...], cut along B, and of scalars, which every part gets.
      key: with one part it is the part's, else each part's number is folded into it.
      parts: divides B.
    """
    if parts == 1:
        return function(inputs, key)

    def add_part(total: Any, numbered: tuple[Any, jax.Array]) -> tuple[Any, None]:
        part, index = numbered
        result = function(part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, result), None

    split = jax.tree.map(functools.partial(_split_rows, parts=parts), inputs)
    first = jax.tree.map(lambda array: array[0], split)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, first, key))
    return jax.lax.scan(add_part, zeros, (split, jnp.arange(parts)))[0]


def _split_rows(array: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [parts, B/parts, ...], interleaved: each device keeps the rows that it holds."""
    if array.ndim == 0:
        return jnp.broadcast_to(array, (parts,))
    rows = array.shape[0] // parts
    return array.reshape(rows, parts, *array.shape[1:]).swapaxes(0, 1)


# ------------------------------------------------------------------------------
# The randomness of a step, from the run's key and the step's number alone.


class StepKeys(NamedTuple):
    """Keys of one step."""

    depth: Key[Array, ""]  # draws of depth
    objective: Key[Array, ""]  # first states, dropout, and the rest


def step_keys(run_key: Key[Array, ""], step: Int[Array, ""] | int) -> StepKeys:
    """The keys of the step that comes after `step` steps.

    A function of its own, so that what a step drew can be told afterwards.
    """
    depth, objective = jax.random.split(jax.random.fold_in(run_key, step))
    return StepKeys(depth, objective)
