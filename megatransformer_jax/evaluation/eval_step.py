"""Scores one batch at one depth."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.losses.tokens import token_loss
from megatransformer_jax.types import Batch


class EvalSums(NamedTuple):
    """Sums over a batch; batches add up field by field."""

    cross_entropy: Float[Array, ""]  # nats, over the tokens that count
    tokens: Float[Array, ""]  # tokens that count
    correct: Float[Array, ""]  # of these, predicted right
    exact_rows: Float[Array, ""]  # rows with all their tokens right
    rows: Float[Array, ""]  # rows with any token that counts


EvalStep = Callable[[Any, Batch, Any], tuple[EvalSums, Int[Array, "B T"]]]


def make_eval_step(model: nn.Module, key: Key[Array, ""]) -> EvalStep:
    """Builds (params, batch, num_steps) -> (sums, predictions); jit it once for all depths.

    `num_steps`, int32 [], is traced. Nothing is random: the thought state's first value comes from
    the same `key` for every batch and depth.

    Args:
      model: called like `MegaTransformer`.
      key: for the rng stream 'state'.
    """

    def eval_step(params: Any, batch: Batch, num_steps: Any) -> tuple[EvalSums, Int[Array, "B T"]]:
        output: Any = model.apply(
            {"params": params},
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            num_steps=num_steps,
            backprop_depth=0,
            deterministic=True,
            rngs={"state": key},
            media=batch.media,
        )
        totals = token_loss(output.logits, batch.targets, batch.loss_mask)
        predictions = jnp.argmax(output.logits, axis=-1).astype(jnp.int32)
        counts = batch.loss_mask > 0
        has_tokens = jnp.any(counts, axis=-1)
        is_exact = jnp.all((predictions == batch.targets) | ~counts, axis=-1) & has_tokens
        sums = EvalSums(
            cross_entropy=totals.cross_entropy,
            tokens=totals.tokens,
            correct=totals.correct,
            exact_rows=jnp.sum(is_exact, dtype=jnp.float32),
            rows=jnp.sum(has_tokens, dtype=jnp.float32),
        )
        return sums, predictions

    return eval_step
