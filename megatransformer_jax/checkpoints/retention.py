"""Which checkpoints are kept."""

import dataclasses
import math
from collections.abc import Sequence

from orbax.checkpoint import checkpoint_managers

from megatransformer_jax.config.run import CheckpointConfig

VALIDATION_LOSS = "validation_loss"


@dataclasses.dataclass
class BestByLoss:
    """Keeps the `count` checkpoints with the lowest validation loss.

    A checkpoint without a validation loss, or with one that is not finite, is no candidate.
    """

    count: int

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> Sequence[bool]:
        """One flag per checkpoint (Orbax's preservation policy)."""
        candidates = [
            (loss, index)
            for index, info in enumerate(checkpoints)
            if math.isfinite(loss := validation_loss(info.metrics))
        ]
        best = {index for _, index in sorted(candidates)[: self.count]}
        return [index in best for index in range(len(checkpoints))]


def validation_loss(metrics: dict | None) -> float:
    """The validation loss stored with a checkpoint, or infinity."""
    return float((metrics or {}).get(VALIDATION_LOSS, math.inf))


def retention_policy(config: CheckpointConfig) -> checkpoint_managers.AnyPreservationPolicy:
    """Keeps what any of the config's rules keeps: the last, the best, the multiples."""
    policies: list = [checkpoint_managers.LatestN(config.keep_last)]
    if config.keep_best:
        policies.append(BestByLoss(config.keep_best))
    if config.keep_every_steps is not None:
        policies.append(checkpoint_managers.EveryNSteps(config.keep_every_steps))
    return checkpoint_managers.AnyPreservationPolicy(policies)
