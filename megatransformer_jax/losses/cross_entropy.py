"""Token cross-entropy with a mask, and the z-loss that keeps logits small."""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenLoss(typing.NamedTuple):
    """Sums over the tokens that count; divide by `tokens` for means."""

    cross_entropy: Float[Array, ""]  # nats
    squared_log_normalizer: Float[Array, ""]
    correct: Float[Array, ""]  # tokens whose target has the highest logit
    tokens: Float[Array, ""]  # that count


def token_cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Each position's cross-entropy in nats; targets are aligned as in `token_loss`."""
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logit


def token_loss(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], loss_mask: Float[Array, "B T"]
) -> TokenLoss:
    """Cross-entropy of aligned targets: `targets[b, t]` is what position t must predict.

    Args:
      logits: float32 scores.
      targets: token ids.
      loss_mask: 1.0 where a position counts, else 0.0.

    Returns:
      Sums, so that shards and micro-batches add up exactly as one batch would.
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1) == targets
    return TokenLoss(
        cross_entropy=jnp.sum((log_normalizer - target_logit) * loss_mask),
        squared_log_normalizer=jnp.sum(jnp.square(log_normalizer) * loss_mask),
        correct=jnp.sum(correct * loss_mask),
        tokens=jnp.sum(loss_mask),
    )
