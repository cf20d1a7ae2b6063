"""What differs between kinds of run: everything else of a run is the same for all of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rich.console import Console

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.batches import Pipeline
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.loop import Hook, StepFunction
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.writers import MultiWriter

ParamsOf = Callable[[TrainState], Any]


class Identified(Protocol):
    """What token ids mean, if there are any."""

    @property
    def digest(self) -> str:
        """The same only for the same vocabulary."""
        ...


@dataclasses.dataclass(frozen=True)
class NoVocabulary:
    """Of runs without text."""

    digest: str = "no text"


class RunKind(Protocol):
    """A run's model, data and judges, built from its config.

    Attributes:
      config: of the run, with what building it has resolved.
      sharder: with the mesh.
      batches: of the training split, of this process.
      facts: words about the model for the overview at the start.
    """

    config: RunConfig
    sharder: Sharder
    batches: Pipeline
    facts: str

    @property
    def vocabulary(self) -> Identified:
        """Must be the same when the run goes on."""
        ...

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the train state."""
        ...

    def fresh_state(self) -> TrainState:
        """The train state of a run that begins."""
        ...

    def step_function(self) -> StepFunction:
        """The train step, compiled or to be compiled when it is called; donates its state."""
        ...

    def place_batch(self, batch: Any) -> Any:
        """Puts this process's part of a batch onto the mesh."""
        ...

    def judges(self, params_of: ParamsOf) -> Sequence[Hook]:
        """Validation: called before a checkpoint, which is saved with its scores."""
        ...

    def observers(self, params_of: ParamsOf, writer: MultiWriter) -> Sequence[Hook]:
        """Samples, and whatever else comes after a checkpoint."""
        ...

    def summarize(self, params: Any, console: Console | None) -> None:
        """Shows and writes the result of the run; called by all processes, the primary one with a
        console."""
        ...
