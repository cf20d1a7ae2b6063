"""What a training step minimises, as a pure function of parameters and a micro-batch."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.tokens import TokenLoss, token_loss
from megatransformer_jax.models.megatransformer import LAST_STATE, MegaTransformer
from megatransformer_jax.models.passes.observed import random_signs, squared_jacobian
from megatransformer_jax.training.gate_term import gate_term
from megatransformer_jax.training.media_term import (
    MediaCounts,
    MediaRoom,
    media_term,
    weigh_losses,
    weighted_losses,
)
from megatransformer_jax.types import Batch

# Keep these draws apart from each other's and from the first state's and dropout's.
_GATE_STREAM, _PROBE_STREAM, _MEDIA_STREAM = 2, 3, 4


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
      media: images and clips of the whole batch; None for text.
    """

    step: jax.Array
    num_tokens: jax.Array
    share: float
    media: MediaCounts | None = None


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

    Terms: with an exit gate exit_expected_loss, exit_kl, exit_entropy (nats) and exit_mean_steps;
    with Jacobian regularisation jacobian_penalty, before its weight; with media text_loss,
    image_loss and audio_loss before their weights, the decoders' parts of them, and media_loss,
    which is what the latter two add to the loss.
    """
    jacobian_weight = config.train.stability.jacobian_weight
    data = config.data
    room = MediaRoom(
        data.media.images_per_row * data.media.most_rows("draw", data.batch_size),
        data.media.audio_per_row * data.media.most_rows("speak", data.batch_size),
    )

    def objective(
        params: Any, part: Batch, num_steps: jax.Array, key: jax.Array, place: Place
    ) -> tuple[jax.Array, ObjectiveSums]:
        state_key, dropout_key = jax.random.split(key)
        output: Any
        output, sown = model.apply(
            {"params": params},
            part.tokens,
            positions=part.positions,
            segment_ids=part.segment_ids,
            num_steps=num_steps,
            backprop_depth=config.model.recurrence.backprop_depth,
            deterministic=False,
            rngs={"state": state_key, "dropout": dropout_key},
            mutable=[LAST_STATE] if jacobian_weight else [],
            media=part.media,
        )
        sums = token_loss(output.logits, part.targets, part.loss_mask)
        weighted = sums.cross_entropy + config.train.z_loss * sums.squared_log_normalizer
        share = weighted / place.num_tokens
        terms: dict[str, jax.Array] = {}
        if place.media is not None:
            media_key = jax.random.fold_in(key, _MEDIA_STREAM)
            term = media_term(model, params, part, output, place.media, room, media_key)
            added = sum(weighted_losses(config.model, term).values(), jnp.float32(0))
            terms = {"text_loss": share, **term.metrics, "media_loss": added}
            share, weights = weigh_losses(
                config.model, params, share, term, place.media, place.share
            )
            terms |= weights
        if config.model.exit_gate.enabled:
            gate_share, gate_terms = _gate_share(model, config, params, part, key, place)
            share, terms = share + gate_share, terms | gate_terms
        if jacobian_weight:
            state = sown[LAST_STATE]["state"][0]
            penalty = _jacobian_share(model, params, part, state, key, place)
            share = share + jacobian_weight * _warmup(config, place.step) * penalty
            terms |= {"jacobian_penalty": penalty}
        return share, ObjectiveSums(sums, terms)

    return objective


def _gate_share(
    model: MegaTransformer,
    config: RunConfig,
    params: Any,
    part: Batch,
    key: jax.Array,
    place: Place,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The exit gate's share of the loss, and its metrics."""
    options = config.train.exit_gate
    sums = gate_term(model, config, params, part, jax.random.fold_in(key, _GATE_STREAM))
    means = {
        "exit_expected_loss": sums.expected_loss / place.num_tokens,
        "exit_kl": sums.divergence / place.num_tokens,
        "exit_entropy": sums.entropy / place.num_tokens,
        "exit_mean_steps": sums.steps / place.num_tokens,
    }
    loss = means["exit_expected_loss"] + options.kl_weight * means["exit_kl"]
    return options.weight * loss, means


def _jacobian_share(
    model: MegaTransformer,
    params: Any,
    part: Batch,
    state: jax.Array,
    key: jax.Array,
    place: Place,
) -> jax.Array:
    """|J^T v|^2 / |v|^2, v being random signs at the tokens that count."""
    width = state.shape[-1]
    probe = random_signs(jax.random.fold_in(key, _PROBE_STREAM), part.loss_mask, width)
    square = squared_jacobian(
        model,
        params,
        part.tokens,
        state,
        probe,
        positions=part.positions,
        segment_ids=part.segment_ids,
    )
    return square / (place.num_tokens * width)


def _warmup(config: RunConfig, step: jax.Array) -> jax.Array:
    """From 0 to 1 over the warmup's steps."""
    steps = config.train.stability.jacobian_warmup_steps
    return jnp.minimum(step / steps, 1.0) if steps else jnp.float32(1.0)
