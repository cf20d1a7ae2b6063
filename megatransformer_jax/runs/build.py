"""Builds the parts of a run from its config: mesh, model, abstract train state, micro-batches."""

import dataclasses
from typing import Any

import jax
import optax
from absl import logging

from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.fine_tuning import FineTuningConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.data.augmentation.text import TextAugmentation
from megatransformer_jax.models.megatransformer import MegaTransformer, build_model
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.micro_batch import (
    CompiledStep,
    Shape,
    StepProgram,
    choose_accumulation,
    compile_step,
    possible_accumulations,
)
from megatransformer_jax.training.state import TrainState, init_state, state_shardings
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# The parts.


def check_augmentation(config: BaseRunConfig) -> None:
    """Reads the file of synonyms and imports the function that `data.augmentation` names.

    Called before anything is built, so that the error comes at once.

    Raises:
      ConfigError: if either cannot be used.
    """
    if isinstance(config.data, DataConfig):
        TextAugmentation.from_config(config.data.augmentation, config.data.seed)


def build_sharded_model(config: RunConfig) -> tuple[MegaTransformer, Sharder]:
    """The model on a mesh over all devices.

    Raises:
      ConfigError: if mesh, devices, model and batch do not fit each other.
    """
    mesh = make_mesh(config.mesh, jax.devices())
    check_run_fits_mesh(config, mesh)
    sharder = Sharder(mesh)
    platform = jax.default_backend()
    policy = DTypePolicy.from_precision(config.train.precision, platform)
    return build_model(config.model, policy, sharder, platform), sharder


def abstract_train_state(
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    sharder: Sharder,
    fine_tuning: FineTuningConfig,
) -> TrainState:
    """Shapes, types and shardings of the train state, without allocating it."""
    shapes = jax.eval_shape(
        lambda key: init_state(model, optimizer, key, fine_tuning=fine_tuning), jax.random.key(0)
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(model, optimizer, sharder, fine_tuning=fine_tuning),
    )


def trained_depth(config: RunConfig) -> int | None:
    """Mean iterations in training, or None for a model without a core."""
    return config.model.recurrence.mean_steps if config.model.is_recurrent else None


def count_parameters(params: Any) -> dict[str, int]:
    """Parameters per top-level module, largest first."""
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(module)) for name, module in params.items()
    }
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


# ------------------------------------------------------------------------------
# Micro-batches of a run with a memory budget: chosen at its start, kept when it goes on.
#
# The chosen number becomes `train.accumulation` of the resolved configuration, in place of the
# budget, so that the run's config.json and its checkpoints name what the run does.


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What is known before anything is built.

    Attributes:
      budget_gib: `train.memory_budget_gib`.
      accumulation: what the run has been started with; None: it starts now.
    """

    budget_gib: float
    accumulation: int | None

    def compile(
        self,
        config: RunConfig,
        model: MegaTransformer,
        optimizer: optax.GradientTransformation,
        sharder: Sharder,
    ) -> tuple[RunConfig, CompiledStep]:
        """The resolved configuration and its train step, compiled.

        Raises:
          ConfigError: if the step does not fit the budget.
        """
        assert sharder.mesh is not None  # `assemble` always makes one.
        ways = sharder.mesh.shape["data"] * sharder.mesh.shape["fsdp"]
        candidates = possible_accumulations(config.data.batch_size, ways)
        if self.accumulation is not None:
            # Another number would not go on bit for bit.
            logging.info("accumulation=%d is that of the run that goes on", self.accumulation)
            candidates = [self.accumulation]
        state = abstract_train_state(model, optimizer, sharder, config.fine_tuning)

        def compile_for(accumulation: int, shape: Shape) -> StepProgram:
            step = make_train_step(model, optimizer, _resolved(config, accumulation))
            return compile_step(step, state, shape, sharder)

        chosen, step = choose_accumulation(
            compile_for, candidates, config.data.batch_shapes, self.budget_gib
        )
        return _resolved(config, chosen), step


def plan_memory(
    config: BaseRunConfig, checkpoints: CheckpointManager
) -> tuple[BaseRunConfig, MemoryPlan | None]:
    """The configuration without a budget, and what is to be done about that; None if nothing is.

    If the run goes on, the configuration has the accumulation that it was started with.
    """
    budget = config.train.memory_budget_gib if isinstance(config, RunConfig) else None
    if budget is None or not isinstance(config, RunConfig):
        return config, None
    step = checkpoints.latest_step()
    accumulation = None
    if step is not None:
        accumulation = int(checkpoints.run_info(step)["config"]["train"]["accumulation"])
        if config.data.batch_size % accumulation:
            # Another batch than the saved one: what compares the configurations says so.
            accumulation = None
    return _resolved(config, accumulation or 1), MemoryPlan(budget, accumulation)


def _resolved(config: RunConfig, accumulation: int) -> RunConfig:
    train = dataclasses.replace(config.train, accumulation=accumulation, memory_budget_gib=None)
    return dataclasses.replace(config, train=train)
