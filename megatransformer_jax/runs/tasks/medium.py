"""What runs that train a model of one medium, without text, have in common."""

import abc
import contextlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from absl import logging
from jaxtyping import Array, Float, Key
from rich import box
from rich.console import Console
from rich.table import Table

from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.data.batches import Pipeline, first_batches
from megatransformer_jax.evaluation.validation import MeanValidation
from megatransformer_jax.runs.build import MemoryPlan
from megatransformer_jax.runs.task import ParamsOf
from megatransformer_jax.runs.workdir import Workdir
from megatransformer_jax.sharding.mesh import make_mesh, share_of_batch
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.storage import write_json
from megatransformer_jax.training.distributed import make_global
from megatransformer_jax.training.loop import Hook, StepFunction
from megatransformer_jax.training.media_hook import MediaSampleHook, MediaSamples
from megatransformer_jax.training.micro_batch import CompiledStep
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import TrainState, first_state, place_state
from megatransformer_jax.training.step import LossStep, make_loss_step
from megatransformer_jax.training.writers import MultiWriter


@runtime_checkable
class MediumModel(Protocol):
    """A model of one medium as training sees it: parameters and the loss that trains them.

    Implementations are frozen.
    """

    def init(self, key: Key[Array, ""]) -> Any:
        """Fresh parameters, float32."""

    def axes(self) -> Any:
        """Logical axis names of every parameter, in the tree of `init`."""

    def loss(
        self, params: Any, batch: Any, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        """The mean over the rows of the batch, and further means by the name of their metric."""

    def judge(self, params: Any, batch: Any) -> dict[str, jax.Array]:
        """Means over the rows of a held-out batch, the same at every call."""


class MediumTask(abc.ABC):
    """A `Task`, from a model, its data and its judges.

    Args:
      config: of the run.
      workdir: gets samples/ and summary.json.
      stack: closes the data when the run ends.
      model: parameters and loss.
      open_data: from the split, and the arguments of this process, to its batches.
      count_rows: how many rows of a host batch count.
      plan: of `train.memory_budget_gib`.
    """

    def __init__(
        self,
        config: BaseRunConfig,
        workdir: Workdir,
        stack: contextlib.ExitStack,
        model: MediumModel,
        open_data: Callable[..., Pipeline],
        count_rows: Callable[[Any], int],
        plan: MemoryPlan | None,
    ):
        self.config = config
        self.digest = "no text"
        self.facts = f"kind: {config.kind}"
        self._workdir = workdir
        self._model = model
        mesh = make_mesh(config.mesh, jax.devices())
        check_rows_fit(config, mesh.shape["data"] * mesh.shape["fsdp"])
        self.sharder = Sharder(mesh)
        self._optimizer = build_optimizer(
            config.optimizer, config.train.steps, config.train.ema_decay
        )
        part, parts = share_of_batch(mesh, jax.process_index())
        processes = {"process_index": part, "process_count": parts}
        self.batches = open_data(split="train", **processes)
        stack.callback(self.batches.close)
        with open_data(split="validation", **processes) as held_out:
            host = first_batches(held_out, config.evaluation.num_batches)
        # One pass over the held-out records: each process has the same number of batches.
        placed = [self.place_batch(batch) for batch in host]
        rows = [count_rows(batch) for batch in placed]
        if not sum(rows):
            raise UserError(
                f"no held-out record of data.media can be used (data.validation_fraction="
                f"{config.data.validation_fraction:g}); fix the data."
            )
        self.validation = MeanValidation(placed, rows, jax.jit(model.judge))
        self._compiled_step: CompiledStep | None = None
        if plan is not None:
            # All batches are of one shape.
            self.config, self._compiled_step = plan.compile(
                config, self._make_step, self.abstract_state(), placed[:1], self.sharder
            )

    def abstract_state(self) -> TrainState:
        """See `Task`."""
        return abstract_state(self._model, self._optimizer, self.sharder)

    def fresh_state(self) -> TrainState:
        """See `Task`."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        make = jax.jit(
            lambda key: _first_state(self._model, self._optimizer, key), out_shardings=shardings
        )
        return make(jax.random.key(self.config.train.seed))

    def step_function(self) -> StepFunction:
        """See `Task`."""
        return self._compiled_step or jax.jit(self._make_step(self.config), donate_argnums=0)

    def _make_step(self, config: BaseRunConfig) -> LossStep:
        return make_loss_step(self._model.loss, self._optimizer, config.train.accumulation)

    def place_batch(self, batch: Any) -> Any:
        """See `Task`."""
        return jax.tree.map(lambda array: make_global(array, self.sharder, "batch"), batch)

    def scores(self, params: Any) -> dict[str, float]:
        """See `Task`."""
        return self.validation.score(params)

    def observers(self, params_of: ParamsOf, writer: MultiWriter) -> list[Hook]:
        """Samples."""
        folder = self._workdir.files / "samples" if jax.process_index() == 0 else None

        def make(state: TrainState, step: int) -> MediaSamples:
            del step  # Nothing is drawn at random.
            return self.samples(params_of(state))

        return [MediaSampleHook(self.config.samples.every_steps, make, writer, folder)]

    @abc.abstractmethod
    def samples(self, params: Any) -> MediaSamples:
        """What the model makes of held-out media."""

    def summarize(self, params: Any, console: Console | None) -> None:
        """Scores the held-out media as a table and in summary.json."""
        scores = self.scores(params)
        if console is None:
            return
        table = Table("validation", "mean", box=box.ASCII, title=self.config.kind)
        for name, value in scores.items():
            table.add_row(name, f"{value:.4f}")
        console.print(table)
        path = self._workdir.files / "summary.json"
        write_json(path, scores)
        logging.info("numbers: %s", self._workdir.final(path))


def abstract_state(model: MediumModel, optimizer: Any, sharder: Sharder) -> TrainState:
    """Shapes, types and shardings of a model's train state."""
    shapes = jax.eval_shape(lambda key: _first_state(model, optimizer, key), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        place_state(shapes, model.axes(), sharder),
    )


def _first_state(model: MediumModel, optimizer: Any, key: jax.Array) -> TrainState:
    init_key, run_key = jax.random.split(key)
    return first_state(model.init(init_key), optimizer, run_key)


def check_rows_fit(config: BaseRunConfig, ways: int) -> None:
    """Checks that the rows of a micro-batch can be shared by the devices.

    Raises:
      ConfigError: otherwise.
    """
    rows = config.data.batch_size // config.train.accumulation
    if rows % ways:
        raise ConfigError(
            "data.batch_size",
            f"{rows} rows per micro-batch are not divisible by the {ways} devices of the mesh axes "
            f"data x fsdp; choose a multiple of {ways}, or a smaller mesh axis.",
        )
