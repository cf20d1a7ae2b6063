"""Compiled parts of showing what a model makes of held-out rows, on a mesh as off it.

Rows are chosen inside the compiled functions, since a process may hold only some of a batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Key

from megatransformer_jax.evaluation.media.media_eval_step import is_after_media, run_model
from megatransformer_jax.generation.placement import for_rows
from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.types import Batch, HostOrDeviceArray, MediaBatch


class Made(NamedTuple):
    """A medium of each of n rows, and the real one that the row has in its place.

    Attributes:
      exists: whether there was such a row.
      tokens: of the row.
      follows: of the row, see `MediaBatch`.
      media: [n, ...], made from the text before it.
      lengths: frames made, of clips.
      real: [n, ...].
      real_lengths: frames of the real clips.
    """

    exists: HostOrDeviceArray  # bool [n]
    tokens: HostOrDeviceArray  # int32 [n, T]
    follows: HostOrDeviceArray  # int32 [n, T]
    media: HostOrDeviceArray  # float32 [n, ...]
    lengths: HostOrDeviceArray | None  # int32 [n]
    real: HostOrDeviceArray  # float32 [n, ...]
    real_lengths: HostOrDeviceArray | None  # int32 [n]


class Answered(NamedTuple):
    """What the model says to a medium of each of n rows.

    Attributes:
      exists: whether there was such a row.
      is_answer: positions that predict the answer: the closing token's, and those behind it.
      answer: what is predicted at each, greedily from what was predicted before.
      targets: what is right there.
      loss_mask: the positions that the right answer has.
      media: [n, ...], the medium.
      lengths: frames of clips.
    """

    exists: HostOrDeviceArray  # bool [n]
    is_answer: HostOrDeviceArray  # bool [n, T]
    answer: HostOrDeviceArray  # int32 [n, T]
    targets: HostOrDeviceArray  # int32 [n, T]
    loss_mask: HostOrDeviceArray  # float32 [n, T]
    media: HostOrDeviceArray  # float32 [n, ...]
    lengths: HostOrDeviceArray | None  # int32 [n]


MakeMedia = Callable[[Any, Batch, Any, Key[Array, ""]], dict[str, Made]]
AnswerMedia = Callable[[Any, Batch, Any], dict[str, Answered]]


def make_making_step(model: MegaTransformer, state_key: Key[Array, ""], count: int) -> MakeMedia:
    """Builds (params, batch, num_steps, key) -> 'image' and 'audio', as far as the model has them.

    The first medium to be made of each of the first rows that have one is made from the row's own
    text, which comes in one pass.

    Args:
      model: with parts for media, on a mesh or not.
      state_key: of the core's first states.
      count: rows of each kind, or all there are.
    """
    kinds = _kinds(model)

    def step(params: Any, batch: Batch, num_steps: Any, key: Key[Array, ""]) -> dict[str, Made]:
        wanted = {kind: _slots(batch, kind)[1] for kind in kinds}
        rows, exists = _first_rows(batch, wanted, count)
        here = for_rows(model, len(rows.tokens))
        params = gather_weights(here, params)
        output = run_model(here, params, rows, num_steps, state_key)
        results = {}
        for number, kind in enumerate(kinds):
            block = _block(exists, kind)
            own = _at(rows, block)
            media, is_made, lengths = _slots(own, kind)
            slot = jnp.argmax(is_made, axis=1)
            condition = _condition_at(output.conditions[kind], len(rows.tokens), block, slot)
            made, made_lengths = _sample(
                here, params, kind, condition, jax.random.fold_in(key, number)
            )
            results[kind] = Made(
                exists[kind],
                own.tokens,
                cast(MediaBatch, own.media).follows,
                made,
                made_lengths,
                _take(media, slot),
                None if lengths is None else _take(lengths, slot),
            )
        return results

    return cast(MakeMedia, _everywhere(model, step))


def make_answering_step(
    model: MegaTransformer, state_key: Key[Array, ""], count: int
) -> AnswerMedia:
    """Builds (params, batch, num_steps) -> 'image' and 'audio', as far as the model has them.

    The first rows with a given medium and text behind it are answered greedily, with a pass over
    them for each token.

    Args:
      model: with parts for media, on a mesh or not.
      state_key: of the core's first states.
      count: rows of each kind, or all there are.
    """
    kinds = _kinds(model)

    def step(params: Any, batch: Batch, num_steps: Any) -> dict[str, Answered]:
        counts = batch.loss_mask > 0
        has_text = jnp.any(counts & is_after_media(cast(MediaBatch, batch.media).follows), axis=1)
        wanted = {}
        for kind in kinds:
            _, is_made, _ = _slots(batch, kind)
            given = _there(batch, kind) & ~is_made
            wanted[kind] = given & (has_text & ~jnp.any(is_made, axis=1))[:, None]
        rows, exists = _first_rows(batch, wanted, count)
        here = for_rows(model, len(rows.tokens))
        params = gather_weights(here, params)
        answer, is_answer = _greedy(here, params, rows, num_steps, state_key)
        results = {}
        for kind in kinds:
            block = _block(exists, kind)
            own = _at(rows, block)
            media, _, lengths = _slots(own, kind)
            slot = jnp.argmax(_there(own, kind), axis=1)
            results[kind] = Answered(
                exists[kind],
                is_answer[block],
                answer[block],
                own.targets,
                own.loss_mask,
                _take(media, slot),
                None if lengths is None else _take(lengths, slot),
            )
        return results

    return cast(AnswerMedia, _everywhere(model, step))


def _greedy(
    model: MegaTransformer, params: Any, rows: Batch, num_steps: Any, state_key: Key[Array, ""]
) -> tuple[Int[Array, "n T"], Bool[Array, "n T"]]:
    """Tokens predicted at every position of the answers, and where these are."""
    media = cast(MediaBatch, rows.media)
    is_answer = is_after_media(media.follows)
    length = is_answer.shape[1]
    first = jnp.where(jnp.any(is_answer, axis=1), jnp.argmax(is_answer, axis=1), length)
    # Rows may grow to their end; a position sees none behind it.
    segment_ids = jnp.ones_like(rows.segment_ids)

    def say(place: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens, answer = carry
        now = rows._replace(tokens=tokens, segment_ids=segment_ids)
        logits = run_model(model, params, now, num_steps, state_key).logits
        said = jnp.argmax(logits[:, place], axis=-1).astype(tokens.dtype)
        answer = answer.at[:, place].set(jnp.where(place >= first, said, answer[:, place]))
        following = jnp.where(place >= first, said, tokens[:, (place + 1) % length])
        is_inside = place + 1 < length
        grown = tokens.at[:, (place + 1) % length].set(following)
        return jnp.where(is_inside, grown, tokens), answer

    carry = rows.tokens, jnp.zeros_like(rows.tokens)
    return jax.lax.fori_loop(jnp.min(first), length, say, carry)[1], is_answer


def _kinds(model: MegaTransformer) -> tuple[str, ...]:
    enabled = {"image": model.config.image.enabled, "audio": model.config.audio.enabled}
    return tuple(kind for kind, is_enabled in enabled.items() if is_enabled)


def _slots(batch: Batch, kind: str) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Media of this kind, which of them are to be made, [B, slots], and their frames."""
    media = cast(MediaBatch, batch.media)
    if kind == "image":
        return media.images, media.is_image & media.is_drawn, None
    return media.mels, (media.mel_lengths > 0) & media.is_spoken, media.mel_lengths


def _there(batch: Batch, kind: str) -> jax.Array:
    media = cast(MediaBatch, batch.media)
    return media.is_image if kind == "image" else media.mel_lengths > 0


def _first_rows(
    batch: Batch, wanted: dict[str, jax.Array], count: int
) -> tuple[Batch, dict[str, jax.Array]]:
    """For each kind the first rows with a wanted slot, one kind below the other, and whether each
    is one; where there are too few, others follow."""
    chosen, exists = [], {}
    for kind, slots in wanted.items():
        has = jnp.any(slots, axis=1)
        rows = jnp.argsort(~has, stable=True)[:count]
        chosen.append(rows)
        exists[kind] = has[rows]
    index = jnp.concatenate(chosen)
    return jax.tree.map(lambda array: array[index], batch), exists


def _block(exists: dict[str, jax.Array], kind: str) -> slice:
    """Where the rows of a kind stand among those of `_first_rows`."""
    names = list(exists)
    start = sum(len(exists[name]) for name in names[: names.index(kind)])
    return slice(start, start + len(exists[kind]))


def _at(rows: Batch, block: slice) -> Batch:
    return jax.tree.map(lambda array: array[block], rows)


def _condition_at(condition: Condition, num_rows: int, block: slice, slot: jax.Array) -> Condition:
    """Of the conditions of all slots those of one slot of each row of a block."""

    def take(array: jax.Array) -> jax.Array:
        return _take(array.reshape(num_rows, -1, *array.shape[1:])[block], slot)

    return jax.tree.map(take, condition)


def _take(array: jax.Array, slot: jax.Array) -> jax.Array:
    """One slot of each row."""
    return array[jnp.arange(len(slot)), slot]


def _sample(
    model: MegaTransformer, params: Any, kind: str, condition: Condition, key: Key[Array, ""]
) -> tuple[jax.Array, jax.Array | None]:
    if kind == "image":
        images = model.apply({"params": params}, condition, key, method="sample_images")
        return cast(jax.Array, images), None
    clips: Any = model.apply({"params": params}, condition, key, method="sample_audio")
    return clips


def _everywhere(model: MegaTransformer, step: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled; every device, and so every process, gets the whole result."""
    mesh = model.sharder.mesh
    if mesh is None:
        return jax.jit(step)
    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
