"""Which checkpoints are kept, and which is the best."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from orbax.checkpoint import checkpoint_managers

from megatransformer_jax.config.loop import CheckpointConfig

# Under this name the loss, alone, was stored before all validation scalars were.
_OLD_LOSS = "validation_loss"
_LOSS = "validation/loss"


class Ranking(NamedTuple):
    """What makes a checkpoint better than another.

    Attributes:
      metric: name of a scalar stored with the checkpoint, such as 'validation/loss'.
      is_higher_better: otherwise a lower value is.
    """

    metric: str
    is_higher_better: bool

    @classmethod
    def from_config(cls, config: CheckpointConfig) -> "Ranking":
        """As `checkpoint.best_metric` and `checkpoint.best_mode` say."""
        return cls(config.best_metric, config.is_higher_better)

    def cost(self, scores: Mapping[str, Any] | None) -> float:
        """Lower is better; infinity for a checkpoint without a finite score."""
        score = stored_score(scores, self.metric)
        if score is None or not math.isfinite(score):
            return math.inf
        return -score if self.is_higher_better else score

    def best(self, scores: Iterable[Mapping[str, Any] | None], count: int) -> list[int]:
        """Indices of the `count` best, best first; fewer if fewer have a finite score.

        Of equal ones the earlier is better.
        """
        costs = [(self.cost(one), index) for index, one in enumerate(scores)]
        return [index for cost, index in sorted(costs)[:count] if cost < math.inf]


@dataclasses.dataclass
class KeepBest:
    """Keeps the `count` best checkpoints (Orbax's preservation policy).

    A checkpoint without the score, or with one that is not finite, is no candidate.
    """

    ranking: Ranking
    count: int

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> Sequence[bool]:
        """One flag per checkpoint."""
        best = self.ranking.best([info.metrics for info in checkpoints], self.count)
        return [index in best for index in range(len(checkpoints))]


class SavedCheckpoint(NamedTuple):
    """What the rules look at (as Orbax's own record of a checkpoint)."""

    step: int
    metrics: Mapping[str, Any] | None


def stored_score(scores: Mapping[str, Any] | None, metric: str) -> float | None:
    """A scalar stored with a checkpoint, or None; also of checkpoints of earlier versions."""
    scores = scores or {}
    value = scores.get(metric, scores.get(_OLD_LOSS) if metric == _LOSS else None)
    return None if value is None else float(value)


def retention_policy(config: CheckpointConfig) -> checkpoint_managers.AnyPreservationPolicy:
    """Keeps what any of the config's rules keeps: the last, the best, the multiples."""
    policies: list = [checkpoint_managers.LatestN(config.keep_last)]
    if config.keep_best:
        policies.append(KeepBest(Ranking.from_config(config), config.keep_best))
    if config.keep_every_steps is not None:
        policies.append(checkpoint_managers.EveryNSteps(config.keep_every_steps))
    return checkpoint_managers.AnyPreservationPolicy(policies)


def kept_steps(config: CheckpointConfig, checkpoints: Sequence[SavedCheckpoint]) -> set[int]:
    """Steps of the checkpoints that the rules keep.

    Args:
      config: the rules.
      checkpoints: all there are, by ascending step.
    """
    flags = retention_policy(config).should_preserve(
        checkpoints,
        context=checkpoint_managers.PreservationContext(),
    )
    return {saved.step for saved, is_kept in zip(checkpoints, flags, strict=True) if is_kept}
