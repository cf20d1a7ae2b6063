"""From a sample to a row of a batch: text with markers, and media in slots; and checks of both."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.media.records import AudioPart, Given, ImagePart, MediaFormats, Sample
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.mel import normalized_mel
from megatransformer_jax.types import AUDIO, IMAGE, Batch, MediaBatch


class SampleError(UserError):
    """A sample that does not fit the model or the row; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class EncodedSample:
    """One row before it is filled up. Text arrays are as in `Batch`.

    Attributes:
      tokens: int32 [n], from the start token to the last token that is read.
      targets: int32 [n]; the last one is the end token, unless a longer text goes on.
      loss_mask: float32 [n], 0 at opening tokens, after which a medium comes instead of text, and
        where a token of given text is next.
      follows: int32 [n], IMAGE or AUDIO at opening tokens.
      images: each float32 [height, width, C].
      is_drawn: for each image, whether it is a target.
      mels: each float32 [frames, M].
      is_spoken: for each clip, whether it is a target.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    follows: np.ndarray
    images: tuple[np.ndarray, ...] = ()
    is_drawn: tuple[bool, ...] = ()
    mels: tuple[np.ndarray, ...] = ()
    is_spoken: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class RowShape:
    """What a row has room for: T tokens, I images, A clips."""

    sequence_length: int
    images: int = 1
    audio: int = 1


def encode_sample(
    sample: Sample, tokenizer: MediaTokenizer, formats: MediaFormats
) -> EncodedSample:
    """`<bos> text <|IMAGE|> <|/IMAGE|> text`, with the end token as the last target.

    Speech stands between <|VOICE|> tokens, other sound between <|AUDIO|> tokens. Tokens of `Given`
    text are no targets of the loss.

    Raises:
      SampleError: for an image of another size, a clip of another rate or of too many frames, or
        values that are not an image or sound, naming the sample.
    """
    ids, kinds, is_learned = [tokenizer.bos_id], [0], [False]
    images, is_drawn, mels, is_spoken = [], [], [], []
    for part in sample.parts:
        if isinstance(part, str | Given):
            text = tokenizer.encode(part if isinstance(part, str) else part.text)
            ids += text
            kinds += [0] * len(text)
            is_learned += [isinstance(part, str)] * len(text)
            continue
        if isinstance(part, ImagePart):
            images.append(_checked_image(part, sample.name, formats))
            is_drawn.append(part.is_target)
            opening = tokenizer.marker_id("<|IMAGE|>")
        else:
            mels.append(_checked_mel(part, sample.name, formats))
            is_spoken.append(part.is_target)
            opening = tokenizer.marker_id("<|VOICE|>" if part.is_voice else "<|AUDIO|>")
        ids += [opening, tokenizer.closing_id(opening)]
        kinds += [tokenizer.medium_after(opening), 0]
        is_learned += [True, True]
    follows = np.array(kinds, np.int32)
    counts = (follows == 0) & np.array([*is_learned[1:], True])
    return EncodedSample(
        tokens=np.array(ids, np.int32),
        targets=np.array([*ids[1:], tokenizer.eos_id], np.int32),
        loss_mask=counts.astype(np.float32),
        follows=follows,
        images=tuple(images),
        is_drawn=tuple(is_drawn),
        mels=tuple(mels),
        is_spoken=tuple(is_spoken),
    )


def check_fits(row: EncodedSample, name: str, shape: RowShape) -> None:
    """Raises:
    SampleError: if the row has more text, images or clips than there is room for.
    """
    for count, room, what, option in (
        (len(row.tokens), shape.sequence_length, "tokens", "data.sequence_length"),
        (len(row.images), shape.images, "images", "data.media.images_per_row"),
        (len(row.mels), shape.audio, "clips", "data.media.audio_per_row"),
    ):
        if count > room:
            raise SampleError(
                f"{name}: has {count} {what}, but a row has room for {room}. Raise {option}, or "
                "shorten it."
            )


def make_batch(
    rows: Sequence[EncodedSample | None],
    tasks: Sequence[int],
    shape: RowShape,
    formats: MediaFormats,
    pad_id: int,
) -> Batch:
    """Rows below each other. None is a row of padding; slots that are not used hold zeros.

    Args:
      rows: each must fit, see `check_fits`.
      tasks: number of each row's task.
      shape: of a row.
      formats: a medium that is not enabled gets no slots.
      pad_id: fills tokens and targets.
    """
    text = _text_arrays(rows, shape.sequence_length, pad_id)
    media = MediaBatch(
        follows=text.pop("follows"),
        task=np.array(tasks, np.int32),
        **(_image_arrays(rows, shape.images, formats) if formats.image.enabled else {}),
        **(_audio_arrays(rows, shape.audio, formats) if formats.audio.enabled else {}),
    )
    return Batch(**text, media=media)


def _text_arrays(
    rows: Sequence[EncodedSample | None], length: int, pad_id: int
) -> dict[str, np.ndarray]:
    shape = (len(rows), length)
    arrays = {
        "tokens": np.full(shape, pad_id, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
        "follows": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    for number, row in enumerate(rows):
        if row is None:
            continue
        size = len(row.tokens)
        for name in ("tokens", "targets", "loss_mask", "follows"):
            arrays[name][number, :size] = getattr(row, name)
        arrays["segment_ids"][number, :size] = 1
        arrays["positions"][number, :size] = np.arange(size)
    return arrays


def _image_arrays(
    rows: Sequence[EncodedSample | None], slots: int, formats: MediaFormats
) -> dict[str, np.ndarray]:
    images = np.zeros((len(rows), slots, *formats.image.shape), np.float32)
    is_image = np.zeros((len(rows), slots), bool)
    is_drawn = np.zeros((len(rows), slots), bool)
    for number, row in enumerate(rows):
        for slot, pixels in enumerate(row.images if row is not None else ()):
            assert row is not None
            images[number, slot] = pixels
            is_image[number, slot] = True
            is_drawn[number, slot] = row.is_drawn[slot]
    return {"images": images, "is_image": is_image, "is_drawn": is_drawn}


def _audio_arrays(
    rows: Sequence[EncodedSample | None], slots: int, formats: MediaFormats
) -> dict[str, np.ndarray]:
    audio = formats.audio
    mels = np.zeros((len(rows), slots, audio.max_frames, audio.mel.num_mels), np.float32)
    lengths = np.zeros((len(rows), slots), np.int32)
    is_spoken = np.zeros((len(rows), slots), bool)
    for number, row in enumerate(rows):
        for slot, mel in enumerate(row.mels if row is not None else ()):
            assert row is not None
            mels[number, slot, : len(mel)] = mel
            lengths[number, slot] = len(mel)
            is_spoken[number, slot] = row.is_spoken[slot]
    return {"mels": mels, "mel_lengths": lengths, "is_spoken": is_spoken}


def _checked_image(part: ImagePart, name: str, formats: MediaFormats) -> np.ndarray:
    pixels = part.pixels
    if not formats.image.enabled:
        raise SampleError(f"{name}: has an image, but model.image.enabled=False; set it to True.")
    if pixels.shape != formats.image.shape:
        raise SampleError(
            f"{name}: the image is {_size(pixels.shape)} (height x width x channels), but "
            f"model.image is {_size(formats.image.shape)}. Resize it, set "
            "data.media.images.on_wrong_size='resize', or change model.image."
        )
    if pixels.dtype != np.float32 or not np.isfinite(pixels).all() or np.abs(pixels).max() > 1:
        raise SampleError(
            f"{name}: pixels must be finite float32 in [-1, 1]; these are {pixels.dtype} from "
            f"{pixels.min()} to {pixels.max()}. Scale them."
        )
    return pixels


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _checked_mel(part: AudioPart, name: str, formats: MediaFormats) -> np.ndarray:
    audio = formats.audio
    if not audio.enabled:
        raise SampleError(f"{name}: has a clip, but model.audio.enabled=False; set it to True.")
    if part.sample_rate_hz != audio.mel.sample_rate_hz:
        raise SampleError(
            f"{name}: the clip has {part.sample_rate_hz} samples per second, but "
            f"model.audio.mel.sample_rate_hz={audio.mel.sample_rate_hz}. Resample it, set "
            "data.media.audio.on_wrong_audio='convert', or change model.audio.mel."
        )
    mel = part.mel
    if mel is None:
        check_waveform(part.waveform, name)
        mel = normalized_mel(part.waveform, audio.mel)
    if len(mel) > audio.max_frames:
        seconds = len(mel) * audio.mel.hop_samples / audio.mel.sample_rate_hz
        raise SampleError(
            f"{name}: the clip has {len(mel)} frames ({seconds:.2f} s), but "
            f"model.audio.max_frames={audio.max_frames}. Cut it up, or raise that."
        )
    return mel


def check_waveform(waveform: np.ndarray, name: str) -> None:
    """Raises:
    SampleError: if it is not mono float32 sound in [-1, 1] of at least one sample.
    """
    if waveform.ndim != 1 or not len(waveform):
        raise SampleError(
            f"{name}: the sound has shape {waveform.shape}; it must be mono, one vector of at "
            "least one sample. Mix its channels."
        )
    if (
        waveform.dtype != np.float32
        or not np.isfinite(waveform).all()
        or np.abs(waveform).max() > 1
    ):
        raise SampleError(
            f"{name}: samples must be finite float32 in [-1, 1]; these are {waveform.dtype} from "
            f"{waveform.min()} to {waveform.max()}. Scale them."
        )


# ------------------------------------------------------------------------------
# Checks that media and their places in the text belong together.

_WORDS = {
    IMAGE: ("images", "<|IMAGE|><|/IMAGE|>"),
    AUDIO: ("clips", "<|AUDIO|><|/AUDIO|> or <|VOICE|><|/VOICE|>"),
}


class MediaCountError(UserError):
    """Media and placeholders are not the same in number."""


def check_prompt(
    ids: Sequence[int], num_images: int, num_clips: int, tokenizer: MediaTokenizer, name: str
) -> None:
    """Checks that a prompt has one placeholder for each medium that is given with it.

    A placeholder is an opening token with its closing one. An opening token at the end asks for a
    medium to be made, and has none.

    Args:
      ids: of the prompt, see `MediaTokenizer.encode_with_media`.
      num_images: images that are given.
      num_clips: clips that are given.
      tokenizer: of the ids.
      name: of the prompt, for the message.

    Raises:
      MediaCountError: otherwise, with both numbers.
    """
    placed = [tokenizer.medium_after(token) for token in ids[:-1]]
    for medium, given in ((IMAGE, num_images), (AUDIO, num_clips)):
        _compare(name, medium, placed.count(medium), given)


def check_media(batch: Batch, tokenizer: MediaTokenizer) -> None:
    """Checks a batch on the host: opening tokens, `follows` and used slots agree in every row.

    Raises:
      MediaCountError: otherwise, naming the row.
      ValueError: if the batch has no media.
    """
    media = batch.media
    if media is None:
        raise ValueError("the batch has no media; give one with a MediaBatch.")
    lookup = np.array([tokenizer.medium_after(token) for token in range(tokenizer.vocab_size)])
    expected = np.where(np.asarray(batch.segment_ids) > 0, lookup[np.asarray(batch.tokens)], 0)
    for row, place in np.argwhere(expected != np.asarray(media.follows)).tolist():
        raise MediaCountError(
            f"row {row}: `follows` is {media.follows[row][place]} at position {place}, whose token "
            f"{batch.tokens[row][place]} asks for {expected[row][place]} (0 none, {IMAGE} image, "
            f"{AUDIO} sound). Make both from the same text."
        )
    for medium, used in (
        (IMAGE, media.is_image),
        (AUDIO, None if media.mel_lengths is None else np.asarray(media.mel_lengths) > 0),
    ):
        for row, placed in enumerate((expected == medium).sum(axis=1)):
            slots = np.zeros(0, bool) if used is None else np.asarray(used)[row]
            _compare(f"row {row}", medium, int(placed), int(slots.sum()))
            if not slots[: int(placed)].all():
                raise MediaCountError(
                    f"row {row}: its {_WORDS[medium][0]} are in slots {np.flatnonzero(slots)}; "
                    "they must be in the first ones, in the order of the text."
                )


def _compare(name: str, medium: int, placed: int, given: int) -> None:
    what, placeholder = _WORDS[medium]
    if placed != given:
        raise MediaCountError(
            f"{name}: has places for {placed} {what}, but {given} {what} are given. Write "
            f"{placeholder} once for each, and give as many."
        )
