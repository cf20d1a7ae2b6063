"""What a model makes of held-out rows and of prompts: images, clips, captions, transcripts.

Compiled parts run on a mesh as off it. Rows are chosen inside the compiled functions, since a
process may hold only some of a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax.data.media.encoding import RowShape, check_fits, encode_sample, make_batch
from megatransformer_jax.data.media.records import AudioPart, ImagePart, MediaFormats, Sample
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.evaluation.media.validation import is_answer, run_model
from megatransformer_jax.generation.placement import for_rows
from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.types import AUDIO, IMAGE, Batch, HostOrDeviceArray, MediaBatch

# ------------------------------------------------------------------------------
# Compiled steps.


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
      media: [n, ...], the images of the row side by side, grey where it has none, or its first
        clip.
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
        follows = cast(MediaBatch, batch.media).follows
        has_text = jnp.any(is_answer(follows, batch.loss_mask), axis=1)
        wanted = {}
        for kind in kinds:
            _, is_made, _ = _slots(batch, kind)
            given = _there(batch, kind) & ~is_made
            wanted[kind] = given & (has_text & ~jnp.any(is_made, axis=1))[:, None]
        rows, exists = _first_rows(batch, wanted, count)
        here = for_rows(model, len(rows.tokens))
        params = gather_weights(here, params)
        answer, is_asked = _greedy(here, params, rows, num_steps, state_key)
        results = {}
        for kind in kinds:
            block = _block(exists, kind)
            own = _at(rows, block)
            media, _, lengths = _slots(own, kind)
            slot = jnp.argmax(_there(own, kind), axis=1)
            shown = _side_by_side(media) if kind == "image" else _take(media, slot)
            results[kind] = Answered(
                exists[kind],
                is_asked[block],
                answer[block],
                own.targets,
                own.loss_mask,
                shown,
                None if lengths is None else _take(lengths, slot),
            )
        return results

    return cast(AnswerMedia, _everywhere(model, step))


def _greedy(
    model: MegaTransformer, params: Any, rows: Batch, num_steps: Any, state_key: Key[Array, ""]
) -> tuple[Int[Array, "n T"], Bool[Array, "n T"]]:
    """Tokens predicted at every position of the answers, and where these are."""
    media = cast(MediaBatch, rows.media)
    is_asked = is_answer(media.follows, rows.loss_mask)
    length = is_asked.shape[1]
    first = jnp.where(jnp.any(is_asked, axis=1), jnp.argmax(is_asked, axis=1), length)
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
    return jax.lax.fori_loop(jnp.min(first), length, say, carry)[1], is_asked


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


def _side_by_side(images: jax.Array) -> jax.Array:
    """[n, height, I * width, C] of [n, I, height, width, C]."""
    rows, slots, height, width, channels = images.shape
    return jnp.moveaxis(images, 1, 2).reshape(rows, height, slots * width, channels)


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


# ------------------------------------------------------------------------------
# Makes images and clips for prompts whose text is given, many at once.
#
# Only the medium is made; the tokens before it are the prompt's, and the closing token is not
# needed. So there is one pass over the text, and one run of the decoder's sampler.

DrawStep = Callable[[Any, Batch, Any, Key[Array, ""]], Float[Array, "B height width C"]]
SpeakStep = Callable[
    [Any, Batch, Any, Key[Array, ""]], tuple[Float[Array, "B F M"], Int[Array, "B"]]
]


def make_draw_step(model: MegaTransformer, state_key: Key[Array, ""], settings: Any) -> DrawStep:
    """Builds (params, batch, num_steps, key) -> the image in the first slot of each row.

    Args:
      model: that draws.
      state_key: of the core's first states.
      settings: of the decoder's sampler; None: the config's.
    """

    def draw_step(
        params: Any, batch: Batch, num_steps: Any, key: Key[Array, ""]
    ) -> Float[Array, "B height width C"]:
        output = run_model(model, params, batch, num_steps, state_key)
        condition = _first_slots(output.conditions["image"], len(batch.tokens))
        images: Any = model.apply(
            {"params": params}, condition, key, settings, method="sample_images"
        )
        return images

    return draw_step


def make_speak_step(model: MegaTransformer, state_key: Key[Array, ""], settings: Any) -> SpeakStep:
    """Builds (params, batch, num_steps, key) -> spectrogram and frames of the first clip of each
    row, of the length that the decoder decides on.

    Args:
      model: that makes sound.
      state_key: of the core's first states.
      settings: of the decoder's sampler; None: the config's.
    """

    def speak_step(
        params: Any, batch: Batch, num_steps: Any, key: Key[Array, ""]
    ) -> tuple[Float[Array, "B F M"], Int[Array, "B"]]:
        output = run_model(model, params, batch, num_steps, state_key)
        condition = _first_slots(output.conditions["audio"], len(batch.tokens))
        clips: Any = model.apply(
            {"params": params}, condition, key, None, settings, method="sample_audio"
        )
        return clips

    return speak_step


def make_all(
    step: Callable[[Any, Batch, Any, Key[Array, ""]], Any],
    params: Any,
    batches: Sequence[Batch],
    num_steps: Any,
    key: Key[Array, ""],
    count: int,
) -> Any:
    """What `step` makes of all batches, one below the other, as NumPy arrays.

    Args:
      step: compiled; `make_draw_step` or `make_speak_step`.
      params: the model's.
      batches: on the host.
      num_steps: iterations of the core, int32 [].
      key: every batch has its own of it.
      count: rows that are kept; those behind them are padding.
    """
    device = jax.local_devices()[0]
    parts = [
        jax.device_get(
            step(params, jax.device_put(batch, device), num_steps, jax.random.fold_in(key, number))
        )
        for number, batch in enumerate(batches)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)


def _first_slots(condition: Any, num_rows: int) -> Any:
    """Of each row's slots the first."""
    return jax.tree.map(
        lambda array: array.reshape(num_rows, -1, *array.shape[1:])[:, 0], condition
    )


# ------------------------------------------------------------------------------
# Greedy answers to media: captions and transcripts, without a cache.
#
# Every new token takes a pass over the whole batch. Answers are short, and the passes are those
# that validation has compiled already, or would.

NextTokens = Callable[[Any, Batch, Any], Int[Array, "B T"]]


def make_next_tokens(model: MegaTransformer, key: Key[Array, ""]) -> NextTokens:
    """Builds (params, batch, num_steps) -> the most likely next token at every position.

    Args:
      model: with parts for media.
      key: of the core's first states.
    """

    def next_tokens(params: Any, batch: Batch, num_steps: Any) -> Int[Array, "B T"]:
        logits = run_model(model, params, batch, num_steps, key).logits
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return next_tokens


def rows_of_task(batches: Sequence[Batch], task: int) -> list[Batch]:
    """The rows of one task, in batches of the size of the first; the last repeats its last row.

    Args:
      batches: on the host, with media.
      task: its number.
    """
    size = len(batches[0].tokens)
    rows: Batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
    is_there = rows.segment_ids.any(axis=1) & (rows.media.task == task)  # type: ignore[union-attr]
    numbers = np.flatnonzero(is_there)
    parts = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    filled = [np.pad(part, (0, size - len(part)), mode="edge") for part in parts]
    return [jax.tree.map(lambda array, of=of: array[of], rows) for of in filled]


def _is_answer(batch: Batch) -> np.ndarray:
    media = cast(MediaBatch, batch.media)
    return np.asarray(is_answer(jnp.asarray(media.follows), jnp.asarray(batch.loss_mask)))


def right_answers(batch: Batch, end_id: int) -> list[list[int]]:
    """The text after the last medium of each row, without the end token."""
    counts = _is_answer(batch) & (np.asarray(batch.loss_mask) > 0)
    targets = np.asarray(batch.targets)
    return [
        [int(token) for token in row[places] if token != end_id]
        for row, places in zip(targets, counts, strict=True)
    ]


def greedy_answers(
    next_tokens: NextTokens, params: Any, batch: Batch, num_steps: Any, end_id: int
) -> list[list[int]]:
    """What the model says after the last medium of each row, up to the end token or the row's end.

    Args:
      next_tokens: compiled.
      params: the model's.
      batch: on the host; text after the last medium is not looked at.
      num_steps: iterations of the core, int32 [].
      end_id: ends an answer.

    Returns:
      Token ids of each row; none for a row without a medium.
    """
    is_asked = _is_answer(batch)
    num_tokens = is_asked.shape[1]
    # The medium's closing token, or the last one of a question, predicts the answer's first token.
    closing = np.where(is_asked.any(axis=1), is_asked.argmax(axis=1), num_tokens)
    tokens = np.array(batch.tokens)
    # Rows may grow to their full length; positions before a token do not see it.
    segment_ids = np.where(closing[:, None] < num_tokens, 1, batch.segment_ids).astype(np.int32)
    answers: list[list[int]] = [[] for _ in tokens]
    is_open = closing < num_tokens
    device = jax.local_devices()[0]
    for place in range(int(closing.min()), num_tokens):
        now = batch._replace(tokens=tokens.copy(), segment_ids=segment_ids)
        predicted = np.asarray(next_tokens(params, jax.device_put(now, device), num_steps))
        for row in np.flatnonzero(is_open & (closing <= place)):
            token = int(predicted[row, place])
            if token == end_id:
                is_open[row] = False
                continue
            answers[row].append(token)
            if place + 1 < num_tokens:
                tokens[row, place + 1] = token
        if not is_open.any():
            break
    return answers


# ------------------------------------------------------------------------------
# Batches whose rows end where a medium is to be made, from prompts.


def prompt_batches(
    prompts: Sequence[str],
    kind: int,
    tokenizer: MediaTokenizer,
    formats: MediaFormats,
    *,
    sequence_length: int,
    batch_size: int,
    is_voice: bool = True,
) -> list[Batch]:
    """Rows of a prompt and an empty slot, in the order of the prompts.

    A decoder reads what the core says up to the opening token, so that what the slot holds does not
    matter. The last batch is filled up with rows of padding.

    Args:
      prompts: at least one.
      kind: IMAGE or AUDIO.
      tokenizer: the model's.
      formats: the model's; a row has one slot of each kind.
      sequence_length: tokens of a row.
      batch_size: rows of a batch.
      is_voice: a clip stands between <|VOICE|> tokens; otherwise <|AUDIO|>.

    Raises:
      UserError: if a prompt does not fit in a row.
      ValueError: for another kind.
    """
    shape = RowShape(sequence_length)
    rows = []
    for prompt in prompts:
        sample = Sample((prompt, _empty(kind, formats, is_voice)), f"the prompt {prompt!r}")
        rows.append(encode_sample(sample, tokenizer, formats))
        check_fits(rows[-1], sample.name, shape)
    batches = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        padded = [*part, *[None] * (batch_size - len(part))]
        batches.append(make_batch(padded, [0] * batch_size, shape, formats, tokenizer.pad_id))
    return batches


def _empty(kind: int, formats: MediaFormats, is_voice: bool) -> ImagePart | AudioPart:
    if kind == IMAGE:
        return ImagePart(np.zeros(formats.image.shape, np.float32), is_target=True)
    if kind == AUDIO:
        mel = formats.audio.mel
        frame = np.zeros((1, mel.num_mels), np.float32)
        silence = np.zeros(mel.hop_samples, np.float32)
        return AudioPart(silence, mel.sample_rate_hz, is_voice, is_target=True, mel=frame)
    raise ValueError(f"kind {kind} is not a medium; give IMAGE={IMAGE} or AUDIO={AUDIO}")
