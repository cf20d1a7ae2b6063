"""Everything that a training step reads and writes, and where its arrays are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from megatransformer_jax import streams
from megatransformer_jax.config.fine_tuning import TRAIN_ALL, FineTuningConfig
from megatransformer_jax.models.adaptation import kept_axes, kept_params
from megatransformer_jax.models.megatransformer import (
    MegaTransformer,
    abstract_params,
    init_params,
)
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.trainable import map_named, path_text, split_params

# ------------------------------------------------------------------------------
# The state.


@struct.dataclass
class TrainState:
    """The state of a run after `step` optimiser steps.

    `key_data` is the run's PRNG key as plain integers; each step folds its number into it, so the
    randomness of a step depends on (seed, step) only.
    """

    # Any, because shapes and shardings travel in the same structure.
    step: Any  # int32 []
    params: Any  # tree of `kept_params`: that of `init_params` but with LoRA
    opt_state: Any  # for the trained ones of them
    key_data: Any  # uint32 [2]
    skipped_steps: Any  # int32 [], non-finite steps since the start
    skipped_in_row: Any  # int32 [], non-finite steps since the last good one

    def key(self) -> Key[Array, ""]:
        """The run's key."""
        return jax.random.wrap_key_data(self.key_data)


def init_state(
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    adjust: Callable[[Any], Any] | None = None,
    *,
    fine_tuning: FineTuningConfig = TRAIN_ALL,
) -> TrainState:
    """A state at step 0 with fresh parameters, which `adjust` may change or replace before all
    else.

    Raises:
      ConfigError: if a pattern of `fine_tuning` does not fit the model.
    """
    params = init_params(model, jax.random.split(key)[0])
    if adjust is not None:
        params = adjust(params)
    return _state_of(model, optimizer, params, key, fine_tuning)


def abstract_state(
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    fine_tuning: FineTuningConfig = TRAIN_ALL,
) -> TrainState:
    """Shapes and types of the state.

    Raises:
      ConfigError: as `init_state`.
    """
    return jax.eval_shape(
        lambda params, key: _state_of(model, optimizer, params, key, fine_tuning),
        abstract_params(model),
        jax.random.key(0),
    )


def _state_of(
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    params: Any,
    key: jax.Array,
    fine_tuning: FineTuningConfig,
) -> TrainState:
    """At step 0; `key` is the one that the parameters come from."""
    init_key, run_key = jax.random.split(key)
    kept = kept_params(
        model, fine_tuning, params, jax.random.fold_in(init_key, streams.ADDED_WEIGHTS)
    )
    return first_state(kept, optimizer, run_key, fine_tuning=fine_tuning)


def first_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    run_key: Key[Array, ""],
    *,
    fine_tuning: FineTuningConfig = TRAIN_ALL,
) -> TrainState:
    """The state at step 0 of parameters of any model."""
    trained, _ = split_params(params, fine_tuning)
    # Each counter is an array of its own: a donated state may not hold one buffer twice.
    step, skipped_steps, skipped_in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(
        step=step,
        params=params,
        opt_state=optimizer.init(trained),
        key_data=jax.random.key_data(run_key),
        skipped_steps=skipped_steps,
        skipped_in_row=skipped_in_row,
    )


def state_shardings(
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    sharder: Sharder,
    *,
    fine_tuning: FineTuningConfig = TRAIN_ALL,
) -> TrainState:
    """The sharding of every array of the state, as a `TrainState`; see `place_state`."""
    abstract = abstract_state(model, optimizer, fine_tuning)
    return place_state(abstract, kept_axes(model, fine_tuning), sharder, fine_tuning=fine_tuning)


def place_state(
    abstract: TrainState,
    axes: Any,
    sharder: Sharder,
    *,
    fine_tuning: FineTuningConfig = TRAIN_ALL,
) -> TrainState:
    """The sharding of every array of a state of any model, as a `TrainState`.

    Parameters follow the rules table, optimiser arrays their parameter as `optimizer_shardings`
    says; everything else is on every device.

    Args:
      abstract: shapes and types.
      axes: logical axis names in the tree of its parameters.
      sharder: with a mesh.
      fine_tuning: which parameters the optimiser's state is for.
    """
    by_param = jax.tree.map(lambda _, names: sharder.sharding(*names), abstract.params, axes)
    replicated = sharder.sharding()
    trained, _ = split_params(abstract.params, fine_tuning)
    places, _ = split_params(by_param, fine_tuning)
    opt_state = optimizer_shardings(abstract.opt_state, trained, places)
    everywhere = jax.tree.map(lambda _: replicated, abstract)
    return everywhere.replace(params=by_param, opt_state=opt_state)


# ------------------------------------------------------------------------------
# Where the arrays of an optimiser's state are.


def optimizer_shardings(opt_state: Any, params: Any, shardings: Any) -> Any:
    """The sharding of every array of an optimiser's state.

    An array belongs to a parameter if its path ends in the parameter's, as those of moments and
    averages do, also inside `optax.masked` and `optax.partition`. With the parameter's shape it
    gets the parameter's sharding; with one axis more in front (a ring of gradients) the same
    behind that axis, which is not cut. Everything else, such as counters and the rows and columns
    of factored moments, is small and on every device.

    Args:
      opt_state: arrays or shapes.
      params: the parameters that the optimiser was made for, arrays or shapes.
      shardings: a tree like `params` of `NamedSharding`s, at least one.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    places = jax.tree.leaves(shardings)
    table = {
        path_text(path): (leaf.shape, place)
        for (path, leaf), place in zip(leaves, places, strict=True)
    }
    replicated = NamedSharding(places[0].mesh, PartitionSpec())

    def sharding(path: str, leaf: Any) -> NamedSharding:
        name = _longest_ending(path, table)
        if name is None:
            return replicated
        shape, place = table[name]
        if leaf.shape == shape:
            return place
        if leaf.shape[1:] == shape:
            return NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
        return replicated

    return map_named(sharding, opt_state)


def _longest_ending(path: str, names: Any) -> str | None:
    """The longest end of a path, at a slash, that is among the names."""
    while path and path not in names:
        path = path.partition("/")[2]
    return path or None
