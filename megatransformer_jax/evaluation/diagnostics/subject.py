"""What diagnostics look at: the model, a few rows, and how deep."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import MegaTransformer, off_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Subject:
    """Made once per run by `make_subject`.

    Attributes:
      config: of the run.
      model: for rows of any number: no constraint of a mesh, XLA attention, no rematerialisation.
      rows: tokens and targets, the same on every device.
      mean_steps: the trained mean number of iterations; 0 without a core.
      num_steps: iterations that are shown; 0 without a core.
      sharder: of the run's parameters.
    """

    config: RunConfig
    model: MegaTransformer
    rows: Batch
    mean_steps: int
    num_steps: int
    sharder: Sharder

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` compiled so that every process can read its whole result."""
        if self.sharder.mesh is None:
            return jax.jit(function)
        return jax.jit(function, out_shardings=self.sharder.sharding())


def make_subject(
    config: RunConfig, model: MegaTransformer, batch: Batch, sharder: Sharder
) -> Subject:
    """Takes the first `diagnostics.num_rows` rows of a global batch on the mesh."""
    plain = off_mesh(model)
    plain = plain.copy(config=dataclasses.replace(plain.config, remat="none"))
    mean_steps = config.model.recurrence.mean_steps if config.model.is_recurrent else 0
    subject = Subject(
        config=config,
        model=plain,
        rows=batch,
        mean_steps=mean_steps,
        num_steps=config.diagnostics.num_steps or 2 * mean_steps,
        sharder=sharder,
    )
    count = config.diagnostics.num_rows
    first_rows = subject.compile(lambda batch: jax.tree.map(lambda part: part[:count], batch))
    return dataclasses.replace(subject, rows=first_rows(batch))
