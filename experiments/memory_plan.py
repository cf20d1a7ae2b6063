"""Micro-batches of a run with a memory budget: chosen at its start, kept when it goes on.

The chosen number becomes `train.accumulation` of the resolved configuration, in place of the
budget, so that the run's config.json and its checkpoints name what the run does.
"""

import dataclasses

import optax
from absl import logging

from experiments.assemble import abstract_train_state
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.micro_batch import (
    CompiledStep,
    Shape,
    StepProgram,
    choose_accumulation,
    compile_step,
    possible_accumulations,
)
from megatransformer_jax.training.step import make_train_step


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
    config: RunConfig, checkpoints: CheckpointManager
) -> tuple[RunConfig, MemoryPlan | None]:
    """The configuration without a budget, and what is to be done about that; None if nothing is.

    If the run goes on, the configuration has the accumulation that it was started with.
    """
    budget = config.train.memory_budget_gib
    if budget is None:
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
