"""Builds the parts of a run from its config: mesh, model, abstract train state, micro-batches."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from absl import logging

from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.fine_tuning import FineTuningConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.config.run_rules import media_places
from megatransformer_jax.data.augmentation.text import TextAugmentation
from megatransformer_jax.models.attention_kernels import KernelChoice, kernel_choices
from megatransformer_jax.models.megatransformer import MegaTransformer, build_model
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, make_mesh, make_sharder
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.micro_batch import (
    CompiledStep,
    StepProgram,
    budget_in_gib,
    choose_accumulation,
    compile_step,
    possible_accumulations,
)
from megatransformer_jax.training.state import TrainState, abstract_state, state_shardings
from megatransformer_jax.types import Batch, DTypePolicy, MediaBatch

Config = TypeVar("Config", bound=BaseRunConfig)

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


def build_sharded_model(
    config: RunConfig, devices: Sequence[Any] | None = None
) -> tuple[MegaTransformer, Sharder]:
    """The model on a mesh over devices.

    Args:
      config: of the run.
      devices: all of one platform; they may be of a topology that is only described. None: all
        that there are.

    Raises:
      ConfigError: if mesh, devices, model and batch do not fit each other.
    """
    devices = jax.devices() if devices is None else devices
    mesh = make_mesh(config.mesh, devices)
    check_run_fits_mesh(config, mesh)
    sharder = make_sharder(config.model, mesh)
    platform = devices[0].platform
    policy = DTypePolicy.from_precision(config.train.precision, platform)
    return build_model(config.model, policy, sharder, platform), sharder


def training_kernels(
    config: RunConfig, model: MegaTransformer, sharder: Sharder | None = None
) -> tuple[KernelChoice, ...]:
    """Attention kernels of the train step; see `kernel_choices`."""
    places = sum(media_places(config))
    lengths = [length + places for _, length in config.data.batch_shapes]
    return kernel_choices(model, lengths, is_training=True, sharder=sharder)


def abstract_train_state(
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    sharder: Sharder,
    fine_tuning: FineTuningConfig,
) -> TrainState:
    """Shapes, types and shardings of the train state, without allocating it."""
    shapes = abstract_state(model, optimizer, fine_tuning)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(model, optimizer, sharder, fine_tuning=fine_tuning),
    )


def abstract_batches(config: RunConfig, sharder: Sharder) -> list[Batch]:
    """Shapes, types and shardings of every kind of batch of a transformer's run, whole ones, from
    the shortest rows to the longest."""
    return [_abstract_batch(config, sharder, *shape) for shape in config.data.batch_shapes]


def _abstract_batch(config: RunConfig, sharder: Sharder, rows: int, length: int) -> Batch:
    def array(dtype: Any, *extents: int, cut: bool = False) -> jax.ShapeDtypeStruct:
        axes = ("batch", "length") if cut else ("batch", *(None,) * len(extents))
        return jax.ShapeDtypeStruct((rows, *extents), dtype, sharding=sharder.sharding(*axes))

    whole, weights = array(jnp.int32, length, cut=True), array(jnp.float32, length, cut=True)
    text = Batch(whole, whole, weights, whole, whole)
    model, data = config.model, config.data.media
    if not model.has_media:
        return text
    media = MediaBatch(follows=array(jnp.int32, length), task=array(jnp.int32))
    if model.image.enabled:
        slots = data.images_per_row
        media = media._replace(
            images=array(jnp.float32, slots, *model.image.shape),
            is_image=array(jnp.bool_, slots),
            is_drawn=array(jnp.bool_, slots),
        )
    if model.audio.enabled:
        slots, audio = data.audio_per_row, model.audio
        media = media._replace(
            mels=array(jnp.float32, slots, audio.max_frames, audio.mel.num_mels),
            mel_lengths=array(jnp.int32, slots),
            is_spoken=array(jnp.bool_, slots),
        )
    return text._replace(media=media)


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
      budget_gib: `train.memory_budget_gib` as a number.
      accumulation: what the run has been started with; None: it starts now.
    """

    budget_gib: float
    accumulation: int | None

    def compile(
        self,
        config: Config,
        make_step: Callable[[Config], Any],
        state: TrainState,
        batches: Sequence[Any],
        sharder: Sharder,
    ) -> tuple[Config, CompiledStep]:
        """The resolved configuration and its train step, compiled.

        Args:
          config: of the run.
          make_step: the train step of a configuration, not yet jitted.
          state: ShapeDtypeStructs with shardings.
          batches: of every kind, as `choose_accumulation` takes them; arrays do as well.
          sharder: with the mesh.

        Raises:
          ConfigError: if the step does not fit the budget.
        """
        candidates = possible_accumulations(config.data.batch_size, sharder.ways("batch"))
        if self.accumulation is not None:
            # Another number would not go on bit for bit.
            logging.info("accumulation=%d is that of the run that goes on", self.accumulation)
            candidates = [self.accumulation]

        def compile_for(accumulation: int, batch: Any) -> StepProgram:
            return compile_step(make_step(_resolved(config, accumulation)), state, batch)

        chosen, step = choose_accumulation(compile_for, candidates, batches, self.budget_gib)
        return _resolved(config, chosen), step


def plan_memory(config: Config, checkpoints: CheckpointManager) -> tuple[Config, MemoryPlan | None]:
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
    return _resolved(config, accumulation or 1), MemoryPlan(budget_in_gib(budget), accumulation)


def _resolved(config: Config, accumulation: int) -> Config:
    train = dataclasses.replace(config.train, accumulation=accumulation, memory_budget_gib=None)
    return dataclasses.replace(config, train=train)
