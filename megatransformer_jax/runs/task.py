"""What differs between runs: everything else of a run is the same for all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console

from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.data.batches import Pipeline
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.loop import Hook, StepFunction
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.writers import MultiWriter

ParamsOf = Callable[[TrainState], Any]


class Task(Protocol):
    """What is learned, from what, and how it is judged and shown; built from a run's config.

    Attributes:
      sharder: with the mesh.
      batches: of the training split, of this process.
      digest: of the vocabulary; it must be the same when the run goes on.
      facts: words about the model for the overview at the start.
    """

    sharder: Sharder
    batches: Pipeline
    digest: str
    facts: str

    @property
    def config(self) -> BaseRunConfig:
        """Of the run, with what building the task has resolved."""
        ...

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the train state."""
        ...

    def fresh_state(self) -> TrainState:
        """The train state of a run that begins."""
        ...

    def step_function(self) -> StepFunction:
        """The train step, which has the loss in it; compiled, or to be compiled when it is called.
        It donates its state."""
        ...

    def place_batch(self, batch: Any) -> Any:
        """Puts this process's part of a batch onto the mesh."""
        ...

    def scores(self, params: Any) -> Mapping[str, float]:
        """Numbers of the validation set by name, the same on every process."""
        ...

    def observers(self, params_of: ParamsOf, writer: MultiWriter) -> Sequence[Hook]:
        """Samples, and whatever else comes after a checkpoint."""
        ...

    def summarize(self, params: Any, console: Console | None) -> None:
        """Shows and writes the result of the run; called by all processes, the primary one with a
        console."""
        ...
