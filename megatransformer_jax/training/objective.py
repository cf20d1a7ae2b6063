"""What a training step minimises, as a pure function of parameters and a micro-batch."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.cross_entropy import TokenLoss, token_loss
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import Batch


class ObjectiveSums(NamedTuple):
    """What micro-batches add up.

    Attributes:
      tokens: sums of the token loss.
      terms: other terms and statistics by the name of their metric, each already divided so that
        the sum over the micro-batches is the mean over the batch. Empty if there are none.
    """

    tokens: TokenLoss
    terms: dict[str, jax.Array]


class Place(NamedTuple):
    """Where in the run and in the batch an objective is evaluated.

    Attributes:
      step: optimiser steps done, int32 []; for terms that warm up.
      num_tokens: tokens of the whole batch that count in the loss, float32 [].
      share: the micro-batch's share of the batch, 1 / `train.accumulation`.
    """

    step: jax.Array
    num_tokens: jax.Array
    share: float


@runtime_checkable
class Objective(Protocol):
    """Pure and differentiable in its first argument."""

    def __call__(
        self, params: Any, part: Batch, num_steps: jax.Array, key: jax.Array, place: Place
    ) -> tuple[jax.Array, ObjectiveSums]:
        """The micro-batch's share of the loss, and its sums."""


def make_objective(model: MegaTransformer, config: RunConfig) -> Objective:
    """The objective of a run: mean cross-entropy, z-loss, and the terms that the config asks for.

    Shares are divided by the whole batch's count, so that micro-batches simply add up.
    """

    def objective(
        params: Any, part: Batch, num_steps: jax.Array, key: jax.Array, place: Place
    ) -> tuple[jax.Array, ObjectiveSums]:
        state_key, dropout_key = jax.random.split(key)
        output: Any = model.apply(
            {"params": params},
            part.tokens,
            positions=part.positions,
            segment_ids=part.segment_ids,
            num_steps=num_steps,
            backprop_depth=config.model.recurrence.backprop_depth,
            deterministic=False,
            rngs={"state": state_key, "dropout": dropout_key},
        )
        sums = token_loss(output.logits, part.targets, part.loss_mask)
        weighted = sums.cross_entropy + config.train.z_loss * sums.squared_log_normalizer
        return weighted / place.num_tokens, ObjectiveSums(sums, {})

    return objective
