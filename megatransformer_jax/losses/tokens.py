"""Losses of tokens: cross-entropy, z-loss, and the loss over where tokens exit."""

import math
import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from megatransformer_jax.nn.adapters import log_continue, log_stop

# ------------------------------------------------------------------------------
# Cross-entropy.


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


# ------------------------------------------------------------------------------
# Where tokens exit, as a distribution over iterations, and the loss that trains it.
#
# With lambda_i the gate's probability of stopping after iteration i, a token exits there with
#
#     p_i = lambda_i prod_{j<i} (1 - lambda_j),   p_n = prod_{j<n} (1 - lambda_j),
#
# and its loss is sum_i p_i L_i + kl_weight KL(p || prior) (PonderNet, arXiv 2107.05407). With the
# uniform prior the KL is log n - H(p): the entropy bonus of Ouro (arXiv 2510.25741).


class ExitLoss(NamedTuple):
    """Sums over the tokens that count; divide by their number for means."""

    expected_loss: Float[Array, ""]  # nats, sum_i p_i L_i
    divergence: Float[Array, ""]  # nats, KL(p || prior)
    entropy: Float[Array, ""]  # nats, H(p)
    steps: Float[Array, ""]  # sum_i i p_i


def exit_log_probs(gate_logits: Float[Array, "n B T"]) -> Float[Array, "n B T"]:
    """log p_i of the iterations 1 .. n; the last takes what is left, whatever its gate says."""
    log_survival = jnp.cumsum(log_continue(gate_logits), axis=0)
    before = jnp.concatenate([jnp.zeros_like(log_survival[:1]), log_survival[:-1]])
    return before.at[:-1].add(log_stop(gate_logits[:-1]))


def uniform_log_prior(num_steps: int) -> Float[Array, "n"]:
    """All iterations alike."""
    return jnp.full((num_steps,), -math.log(num_steps))


def geometric_log_prior(num_steps: int, mean: float) -> Float[Array, "n"]:
    """Geometric with this mean (above 1); the last iteration takes what is left."""
    logit = -math.log(mean - 1.0)  # of stopping with probability 1 / mean
    return exit_log_probs(jnp.full((num_steps, 1, 1), logit))[:, 0, 0]


def exit_loss(
    log_probs: Float[Array, "n B T"],
    token_losses: Float[Array, "n B T"],
    loss_mask: Float[Array, "B T"],
    log_prior: Float[Array, "n"],
) -> ExitLoss:
    """The loss's parts.

    Args:
      log_probs: of `exit_log_probs`.
      token_losses: L_i in nats, each iteration's.
      loss_mask: 1.0 where a position counts, else 0.0.
      log_prior: log-probabilities of the prior.
    """
    probs = jnp.exp(log_probs)
    steps = jnp.arange(1, log_probs.shape[0] + 1, dtype=jnp.float32)[:, None, None]

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sum(probs * values, axis=0) * loss_mask)

    return ExitLoss(
        expected_loss=mean(token_losses),
        divergence=mean(log_probs - log_prior[:, None, None]),
        entropy=mean(-log_probs),
        steps=mean(steps),
    )


# ------------------------------------------------------------------------------
# The gate learns from what each iteration gains (Ouro's second stage, arXiv 2510.25741).


def gain_loss(
    gate_logits: Float[Array, "n B T"],
    token_losses: Float[Array, "n B T"],
    loss_mask: Float[Array, "B T"],
    slope: float,
    threshold: float,
) -> Float[Array, ""]:
    """The sum over tokens of the mean over iterations 2 .. n of the cross-entropy of going on.

    An iteration that lowered its token's loss by `gain` nats (at least 0) wants the gate to go on
    with probability sigmoid(slope (gain - threshold)). The losses are taken as constants.

    Args:
      gate_logits: of stopping after each iteration.
      token_losses: L_i in nats, each iteration's.
      loss_mask: 1.0 where a position counts, else 0.0.
      slope: per nat.
      threshold: in nats.
    """
    losses = jax.lax.stop_gradient(token_losses)
    gain = jnp.maximum(losses[:-1] - losses[1:], 0.0)
    goes_on = jax.nn.sigmoid(slope * (gain - threshold))
    logits = gate_logits[1:]
    entropy = -(goes_on * log_continue(logits) + (1 - goes_on) * log_stop(logits))
    return jnp.sum(jnp.mean(entropy, axis=0) * loss_mask)
