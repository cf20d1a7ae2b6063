"""What a training step minimises, as a pure function of parameters and a micro-batch.

The text's loss, at the drawn depth or at every iteration, and the terms that the exit gate and
media add to it.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from megatransformer_jax import streams
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.tokens import (
    ExitLoss,
    TokenLoss,
    exit_log_probs,
    exit_loss,
    gain_loss,
    geometric_log_prior,
    token_cross_entropy,
    token_loss,
    uniform_log_prior,
)
from megatransformer_jax.models.core import recur_observed
from megatransformer_jax.models.implicit import SETTLING
from megatransformer_jax.models.megatransformer import (
    LAST_STATE,
    PREVIOUS_STATE,
    MegaTransformer,
    gather_weights,
    param_axes,
    with_xla_attention,
)
from megatransformer_jax.models.passes.observed import open_batch, random_signs, squared_jacobian
from megatransformer_jax.nn.cut_matrices import cut_matrices
from megatransformer_jax.ops.interleave import Layout, take_places
from megatransformer_jax.types import Batch, MediaBatch, ModelOutput

# ------------------------------------------------------------------------------
# The exit gate's term of the loss.


def gate_steps(config: RunConfig) -> int:
    """Iterations that the term looks at."""
    wanted = config.train.exit_gate.max_steps
    return 2 * config.model.recurrence.mean_steps if wanted is None else wanted


def gate_term(
    model: MegaTransformer, config: RunConfig, params: Any, part: Batch, key: Key[Array, ""]
) -> tuple[ExitLoss, jax.Array | None]:
    """The term's sums over a micro-batch, from a pass of its own over all iterations.

    Every iteration's state goes through coda and head; with media, at the text's places. Gradients
    flow to the core through the last `recurrence.backprop_depth` iterations; with
    `train.exit_gate.detach` to the gate alone, and then nothing of the pass is stored for the
    backward pass but the states. No dropout: the gate learns from what the model does in use.

    Returns:
      The sums under the gate's exit distribution; and the sum of `gain_loss` with target='gain'.
    """
    options = config.train.exit_gate
    params = gather_weights(model, params)
    if options.detach:
        params = {**jax.lax.stop_gradient(params), "exit_gate": params["exit_gate"]}
    entered, core = open_batch(model, params, part)

    def apply(*arguments: Any, method: str) -> Any:
        return model.apply({"params": params}, *arguments, method=method)

    def observe(state: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, hidden = apply(state, core.outer, method="run_coda")
        hidden, state = entered.at_text(hidden), entered.at_text(state)
        losses = token_cross_entropy(apply(hidden, method="run_head"), part.targets)
        return losses, apply(state, method="run_gate")

    num_steps = gate_steps(config)
    losses, gate_logits = cast(
        tuple[jax.Array, jax.Array],
        recur_observed(
            core,
            core.first_state(key),
            observe,
            num_steps=num_steps,
            backprop_depth=config.model.recurrence.backprop_depth,
            trains_state=config.model.recurrence.trains_state,
        ),
    )
    log_prior = _log_prior(options.prior_mean, num_steps)
    sums = exit_loss(exit_log_probs(gate_logits), losses, part.loss_mask, log_prior)
    if options.target != "gain":
        return sums, None
    slope, threshold = options.gain_slope, options.gain_threshold
    return sums, gain_loss(gate_logits, losses, part.loss_mask, slope, threshold)


def _log_prior(mean: float | None, num_steps: int) -> Float[Array, "n"]:
    return uniform_log_prior(num_steps) if mean is None else geometric_log_prior(num_steps, mean)


# ------------------------------------------------------------------------------
# The text's loss at every iteration, under a fixed prior.


def supervised_steps(config: RunConfig) -> int:
    """Iterations that have a loss."""
    wanted = config.train.supervision.max_steps
    return config.model.recurrence.mean_steps if wanted is None else wanted


def supervise(
    model: MegaTransformer, config: RunConfig, params: Any, part: Batch, key: Key[Array, ""]
) -> TokenLoss:
    """A micro-batch's sums at each iteration, as arrays [n].

    Gradients flow to the core through the last `recurrence.backprop_depth` iterations, so earlier
    losses train coda and head alone. Each iteration of the core draws its own dropout; the coda
    drops the same in all of them.
    """
    state_key, dropout_key = jax.random.split(key)
    params = gather_weights(model, params)
    entered, core = open_batch(model, params, part, dropout_key)
    apply = functools.partial(model.apply, {"params": params}, rngs={"dropout": dropout_key})

    def observe(state: jax.Array) -> TokenLoss:
        _, hidden = cast(Any, apply(state, core.outer, method="run_coda"))
        logits = cast(jax.Array, apply(entered.at_text(hidden), method="run_head"))
        return token_loss(logits, part.targets, part.loss_mask)

    recurrence = config.model.recurrence
    sums = recur_observed(
        core,
        core.first_state(state_key),
        observe,
        num_steps=supervised_steps(config),
        backprop_depth=recurrence.backprop_depth,
        trains_state=recurrence.trains_state,
        unroll=recurrence.unroll,
    )
    return cast(TokenLoss, sums)


def _supervised_share(
    model: MegaTransformer, config: RunConfig, params: Any, part: Batch, key: jax.Array, place: Any
) -> tuple[jax.Array, TokenLoss, dict[str, jax.Array]]:
    """The mean over iterations under the prior, sums at the last one, and the metric."""
    sums = supervise(model, config, params, part, key)
    prior = jnp.exp(_log_prior(config.train.supervision.prior_mean, sums.tokens.shape[0]))
    mean = jnp.sum(prior * sums.cross_entropy) / place.num_tokens
    penalty = jnp.sum(prior * sums.squared_log_normalizer) / place.num_tokens
    last = jax.tree.map(lambda values: values[-1], sums)
    return mean + config.train.z_loss * penalty, last, {"supervised_loss": mean}


# ------------------------------------------------------------------------------
# What images and sound add to a training step's loss.

# Order of `log_variances` in the model.
KINDS = ("text", "image", "audio")


class MediaCounts(NamedTuple):
    """Media of a whole batch, float32 []: in it, and of these what decoders learn to make."""

    images: jax.Array
    drawn_images: jax.Array
    clips: jax.Array
    spoken_clips: jax.Array


class MediaRoom(NamedTuple):
    """Most media of a batch that decoders learn to make; they compute no others, and with 0 have no
    term."""

    images: int
    clips: int


class MediaTerm(NamedTuple):
    """A micro-batch's share.

    Attributes:
      images: share of the image decoder's mean loss, before any weight; None without images.
      clips: the same for sound.
      metrics: by name: image_loss, audio_loss, and their parts such as audio_duration.
    """

    images: jax.Array | None
    clips: jax.Array | None
    metrics: dict[str, jax.Array]


def count_media(media: MediaBatch) -> MediaCounts:
    """Counts of a batch or of a part of it."""

    def count(exists: jax.Array | None) -> jax.Array:
        return jnp.float32(0) if exists is None else jnp.sum(exists, dtype=jnp.float32)

    has_clip = None if media.mel_lengths is None else media.mel_lengths > 0
    return MediaCounts(
        count(media.is_image),
        count(None if media.is_image is None else media.is_image & media.is_drawn),
        count(has_clip),
        count(None if has_clip is None else has_clip & media.is_spoken),
    )


def media_term(
    model: MegaTransformer,
    params: Any,
    part: Batch,
    output: ModelOutput,
    counts: MediaCounts,
    room: MediaRoom,
    key: jax.Array,
) -> MediaTerm:
    """Losses of the media that the decoders learn to make, each divided by the count of the whole
    batch, so that micro-batches add up.

    Args:
      model: with parts for media.
      params: its parameters.
      part: a micro-batch with media.
      output: of the pass over it.
      counts: of the whole batch.
      room: of the whole batch. If there are more media to make than that, the term is NaN.
      key: of noise and time steps.
    """
    media = cast(MediaBatch, part.media)
    image_key, audio_key = jax.random.split(key)
    images = clips = None
    metrics: dict[str, jax.Array] = {}
    if model.config.image.enabled and room.images:
        is_drawn = (media.is_image & media.is_drawn).reshape(-1)
        flat = media.images.reshape(-1, *media.images.shape[2:])
        chosen, (flat, condition) = _first(
            model, is_drawn, room.images, (flat, output.conditions["image"])
        )
        terms: Any = model.apply(
            {"params": params}, flat, condition, image_key, method="image_loss"
        )
        means = _shares(terms, chosen, is_drawn, counts.drawn_images, "image")
        images, metrics = means["image_loss"], metrics | means
    if model.config.audio.enabled and room.clips:
        lengths = media.mel_lengths.reshape(-1)
        is_spoken = (lengths > 0) & media.is_spoken.reshape(-1)
        flat = media.mels.reshape(-1, *media.mels.shape[2:])
        chosen, (flat, lengths, condition) = _first(
            model, is_spoken, room.clips, (flat, lengths, output.conditions["audio"])
        )
        terms = model.apply(
            {"params": params}, flat, lengths, condition, audio_key, method="audio_loss"
        )
        means = _shares(terms, chosen, is_spoken, counts.spoken_clips, "audio")
        clips, metrics = means["audio_loss"], metrics | means
    return MediaTerm(images, clips, metrics)


def weighted_losses(config: ModelConfig, term: MediaTerm) -> dict[str, jax.Array]:
    """Shares of media at the fixed weights, by 'image' and 'audio'; those that there are."""
    weighted = {}
    if term.images is not None:
        weighted["image"] = config.image.decoder.loss_weight * term.images
    if term.clips is not None:
        weighted["audio"] = config.audio.decoder.loss_weight * term.clips
    return weighted


def weigh_losses(
    config: ModelConfig,
    params: Any,
    text: jax.Array,
    term: MediaTerm,
    counts: MediaCounts,
    share: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of a micro-batch's shares, and metrics of learned weights.

    With `loss_weighting='learned'` a loss L counts as exp(-s) L + s. Where a batch has nothing of a
    kind its s is left out too, or it would fall without end.

    Args:
      config: of the model.
      params: of the model.
      text: share of the text's loss.
      term: shares of media.
      counts: of the whole batch.
      share: the micro-batch's share of the batch.

    Returns:
      The sum, and by name `loss_weight_text`, `_image`, `_audio`: exp(-s), each as a share.
    """
    losses = {"text": text, **weighted_losses(config, term)}
    if config.loss_weighting == "fixed":
        return sum(losses.values(), jnp.float32(0)), {}
    numbers = {"image": counts.drawn_images, "audio": counts.spoken_clips}
    total, metrics = jnp.float32(0), {}
    for name, loss in losses.items():
        log_variance = params["media"]["log_variances"][KINDS.index(name)]
        weight = jnp.exp(-log_variance)
        is_there = jnp.sign(numbers[name]) if name in numbers else 1.0
        total = total + weight * loss + is_there * share * log_variance
        metrics[f"loss_weight_{name}"] = share * weight
    return total, metrics


def _first(
    model: MegaTransformer, counts_in: jax.Array, room: int, arrays: Any
) -> tuple[jax.Array, Any]:
    """Those that count, in front and padded with others to `room`: which they are, and their
    arrays.

    Decoders are expensive, and most slots of a mixed batch are empty or hold media that are only
    read.
    """
    ways = model.sharder.ways("batch")
    size = min(-(-room // ways) * ways, counts_in.shape[0])
    order = jnp.argsort(~counts_in, stable=True)[:size]

    def take(array: jax.Array) -> jax.Array:
        return model.sharder.constrain(array[order], "batch", *(None,) * (array.ndim - 1))

    return counts_in[order], jax.tree.map(take, arrays)


def _shares(
    terms: dict[str, jax.Array],
    chosen: jax.Array,
    counts_in: jax.Array,
    num_media: jax.Array,
    kind: str,
) -> dict[str, jax.Array]:
    """Means over the media of the batch, as far as this part has them; NaN if some had no room."""
    all_fit = jnp.sum(chosen) == jnp.sum(counts_in)
    return {
        f"{kind}_{name}": jnp.where(all_fit, jnp.sum(jnp.where(chosen, values, 0)), jnp.nan)
        / jnp.maximum(num_media, 1)
        for name, values in terms.items()
    }


# ------------------------------------------------------------------------------
# The text, and all terms together.


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


def make_objective(
    model: MegaTransformer,
    config: RunConfig,
    room: MediaRoom | None = None,
    backprop_depth: int | None = None,
) -> Objective:
    """The objective of a run: mean cross-entropy, z-loss, and the terms that the config asks for.

    Shares are divided by the whole batch's count, so that micro-batches simply add up. Where all
    iterations have a loss, sums are those of the last.

    Terms: with an exit gate exit_expected_loss, exit_kl or exit_gain_loss, exit_entropy (nats) and
    exit_mean_steps; with a loss at every iteration supervised_loss, their mean under the prior;
    with Jacobian regularisation jacobian_penalty and with the fixed-point loss fixed_point_penalty,
    before their weights; with the implicit gradient implicit_residual and implicit_iterations,
    means over rows; with media text_loss, image_loss and audio_loss before their weights, the
    decoders' parts of them, and media_loss, which is what the latter two add to the loss.

    Args:
      model: the model.
      config: of the run.
      room: most media of a batch that decoders learn to make. None: as a training batch has.
      backprop_depth: last iterations that gradients flow through. None: as the config says.
    """
    if backprop_depth is None:
        backprop_depth = config.model.recurrence.backprop_depth
    supervision, data = config.train.supervision, config.data
    room = room or MediaRoom(
        data.media.most_drawn(data.batch_size), data.media.most_spoken(data.batch_size)
    )

    def objective(
        params: Any, part: Batch, num_steps: jax.Array, key: jax.Array, place: Place
    ) -> tuple[jax.Array, ObjectiveSums]:
        if supervision.is_alone:
            share, sums, terms = _supervised_share(model, config, params, part, key, place)
            if config.model.exit_gate.enabled:
                of_gate, gate_terms = _gate_share(model, config, params, part, key, place)
                share, terms = share + of_gate, terms | gate_terms
            return share, ObjectiveSums(sums, terms)
        state_key, dropout_key = jax.random.split(key)
        copied = cut_matrices(params, param_axes(model), model.sharder, part.tokens.shape[0])
        output: Any
        output, sown = model.apply(
            {"params": copied},
            part.tokens,
            positions=part.positions,
            segment_ids=part.segment_ids,
            num_steps=num_steps,
            backprop_depth=backprop_depth,
            deterministic=False,
            rngs={"state": state_key, "dropout": dropout_key},
            mutable=_sown_for(config),
            media=part.media,
            fills_slots=data.media.fills_slots,
        )
        sums = token_loss(output.logits, part.targets, part.loss_mask)
        weighted = sums.cross_entropy + config.train.z_loss * sums.squared_log_normalizer
        share = weighted / place.num_tokens
        terms = {}
        if supervision.prior != "none":
            own_key = jax.random.fold_in(key, streams.SUPERVISION)
            mean, _, terms = _supervised_share(model, config, params, part, own_key, place)
            share = (1 - supervision.mix) * share + supervision.mix * mean
        if place.media is not None:
            media_key = jax.random.fold_in(key, streams.MEDIA)
            term = media_term(model, params, part, output, place.media, room, media_key)
            added = sum(weighted_losses(config.model, term).values(), jnp.float32(0))
            terms |= {"text_loss": share, **term.metrics, "media_loss": added}
            share, weights = weigh_losses(
                config.model, params, share, term, place.media, place.share
            )
            terms |= weights
        if config.model.exit_gate.enabled:
            gate_share, gate_terms = _gate_share(model, config, params, part, key, place)
            share, terms = share + gate_share, terms | gate_terms
        penalties = _penalties(model, config, params, part, sown, num_steps, key, place)
        for name, weight, penalty in penalties:
            share, terms = share + weight * penalty, terms | {name: penalty}
        for name, (mean,) in sown.get(SETTLING, {}).items():
            terms[name] = place.share * mean
        return share, ObjectiveSums(sums, terms)

    return objective


def _sown_for(config: RunConfig) -> list[str]:
    """Collections that the objective reads after the pass."""
    stability, sown = config.train.stability, []
    if stability.jacobian_weight or stability.fixed_point_weight:
        sown.append(LAST_STATE)
    if stability.fixed_point_weight:
        sown.append(PREVIOUS_STATE)
    if config.model.recurrence.gradient == "implicit":
        sown.append(SETTLING)
    return sown


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
    sums, gained = gate_term(model, config, params, part, jax.random.fold_in(key, streams.GATE))
    means = {
        "exit_expected_loss": sums.expected_loss / place.num_tokens,
        "exit_entropy": sums.entropy / place.num_tokens,
        "exit_mean_steps": sums.steps / place.num_tokens,
    }
    if gained is not None:
        means["exit_gain_loss"] = loss = gained / place.num_tokens
    else:
        means["exit_kl"] = sums.divergence / place.num_tokens
        loss = means["exit_expected_loss"] + options.kl_weight * means["exit_kl"]
    return options.weight * loss, means


def jacobian_term(
    model: MegaTransformer,
    params: Any,
    part: Batch,
    state: jax.Array,
    num_steps: jax.Array,
    key: jax.Array,
    place: Place,
) -> jax.Array:
    """|J^T v|^2 / |v|^2, v being random signs at the text's tokens that count.

    J's columns are those of all places, media included.
    """
    entered, core = open_batch(with_xla_attention(model), params, part)
    width = state.shape[-1]
    mask = entered.from_text(part.loss_mask)
    probe = random_signs(jax.random.fold_in(key, streams.PROBE), mask, width)
    return squared_jacobian(core, state, probe, num_steps) / (place.num_tokens * width)


def fixed_point_term(
    model: MegaTransformer,
    params: Any,
    part: Batch,
    states: tuple[jax.Array, jax.Array],
    num_steps: jax.Array,
    place: Place,
) -> jax.Array:
    """|h_T - h_{T-1}|^2 / |h_T|^2, summed over the text's tokens that count.

    Gradients flow through both states, so that a token may also settle earlier. |h_T| is a
    constant to them: a core without norms around its residual could otherwise lower the term by
    making its state larger. Tokens of one iteration add nothing, because h_{T-1} is their first
    state, which is random or the input: no place to stay.

    Args:
      model: the model.
      params: its parameters.
      part: a micro-batch.
      states: h_{T-1} and h_T, the core's raw states before and after the last iteration.
      num_steps: T: [], [B] or [B, S].
      place: where in the batch; the sum is divided by all of its tokens that count.
    """
    previous, last = (state.astype(jnp.float32) for state in states)
    size = jax.lax.stop_gradient(jnp.sum(jnp.square(last), axis=-1))
    moved = jnp.sum(jnp.square(last - previous), axis=-1) / jnp.maximum(size, _SMALLEST_SIZE)
    counts = num_steps.reshape(num_steps.shape + (1,) * (2 - num_steps.ndim))
    moved = jnp.where(counts > 1, moved, 0.0)
    if part.media is not None:
        layout: Any = model.apply({"params": params}, part, method=_layout)
        moved = take_places(moved, layout.text_places)
    return jnp.sum(moved * part.loss_mask) / place.num_tokens


def _layout(model: MegaTransformer, part: Batch) -> Layout:
    return model.media.layout(cast(MediaBatch, part.media), part.segment_ids)


# |h_T|^2 of a state of zeros, which is divided by.
_SMALLEST_SIZE = 1e-12


def _penalties(
    model: MegaTransformer,
    config: RunConfig,
    params: Any,
    part: Batch,
    sown: Any,
    num_steps: jax.Array,
    key: jax.Array,
    place: Place,
) -> Iterator[tuple[str, jax.Array, jax.Array]]:
    """Those of stability that are on: name, weight by now, and share before it."""
    stability = config.train.stability
    if stability.jacobian_weight:
        state = sown[LAST_STATE]["state"][0]
        penalty = jacobian_term(model, params, part, state, num_steps, key, place)
        factor = _warmup(stability.jacobian_warmup_steps, place.step)
        yield "jacobian_penalty", stability.jacobian_weight * factor, penalty
    if stability.fixed_point_weight:
        states = sown[PREVIOUS_STATE]["state"][0], sown[LAST_STATE]["state"][0]
        penalty = fixed_point_term(model, params, part, states, num_steps, place)
        factor = _warmup(stability.fixed_point_warmup_steps, place.step)
        yield "fixed_point_penalty", stability.fixed_point_weight * factor, penalty


def _warmup(steps: int, step: jax.Array) -> jax.Array:
    """From 0 to 1 over the warmup's steps."""
    return jnp.minimum(step / steps, 1.0) if steps else jnp.float32(1.0)
