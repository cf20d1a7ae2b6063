"""Prompts of text, images and sound: rows on the host, arrays of fixed shape."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.sampling import check_encodable
from megatransformer_jax.data.media.encoding import check_prompt, encode_sample
from megatransformer_jax.data.media.records import AudioPart, ImagePart, MediaFormats, Part, Sample
from megatransformer_jax.data.media_tokenizer import MARKERS, MEDIUM_AFTER, MediaTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.request import (
    CachePlan,
    GeneratedImage,
    GeneratedMedium,
    plan_cache,
    round_columns,
)
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import AUDIO, IMAGE, MediaBatch

# ------------------------------------------------------------------------------
# Prompts.

_PLACEHOLDER = re.compile(r"<\|(IMAGE|AUDIO|VOICE)\|><\|/\1\|>")


@dataclasses.dataclass(frozen=True)
class MediaPrompt:
    """What is continued.

    Attributes:
      parts: texts, images and clips in their order; `is_target` of media is not read.
      opens: marker of a medium that is made at once: '<|IMAGE|>', '<|AUDIO|>' or '<|VOICE|>'.
        None: the prompt is continued with text, which may ask for media by itself.
      name: for messages.
    """

    parts: tuple[Part, ...]
    opens: str | None = None
    name: str = "prompt"

    def __str__(self) -> str:
        """The text, with markers in the places of given media."""
        texts = []
        for part in self.parts:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, ImagePart):
                texts.append("<|IMAGE|><|/IMAGE|>")
            else:
                texts.append("<|VOICE|><|/VOICE|>" if part.is_voice else "<|AUDIO|><|/AUDIO|>")
        return "".join(texts)


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it.

    Attributes:
      ids: the start token, text, opening and closing tokens.
      images: each float32 [height, width, C], in the order of their opening tokens.
      mels: each float32 [frames, M].
      name: for messages; empty for its number.
    """

    ids: tuple[int, ...]
    images: tuple[np.ndarray, ...] = ()
    mels: tuple[np.ndarray, ...] = ()
    name: str = ""


def prompt_of_text(
    text: str,
    media: Sequence[ImagePart | AudioPart],
    tokenizer: MediaTokenizer,
    name: str = "prompt",
) -> MediaPrompt:
    """A prompt from a text with markers.

    `<|IMAGE|><|/IMAGE|>` stands for the next given image, `<|AUDIO|><|/AUDIO|>` and
    `<|VOICE|><|/VOICE|>` for the next given clip; `<|VOICE|>` says that it is speech. A text that
    ends with an opening marker alone asks for a medium. Media of a text without any placeholder
    come before it.

    Args:
      text: may be empty if there are media.
      media: in the order of their placeholders.
      tokenizer: of the model.
      name: of the prompt, for messages.

    Raises:
      UserError: if markers and media do not fit each other.
    """
    if not text and not media:
        raise UserError(f"{name}: is empty; give some text or a medium.")
    check_encodable(name, (text,))
    ids = tokenizer.encode_with_media(text)
    opened = tokenizer.marker_of(ids[-1]) if ids else None
    opens = opened if opened in MEDIUM_AFTER else None
    if opens is not None:
        text = text[: -len(opens)]
    if not _PLACEHOLDER.search(text):
        return MediaPrompt((*media, *([text] if text else [])), opens, name)
    images = [part for part in media if isinstance(part, ImagePart)]
    clips = [part for part in media if isinstance(part, AudioPart)]
    check_prompt(ids, len(images), len(clips), tokenizer, name)
    parts: list[Part] = []
    # Texts and the kinds of placeholders take turns.
    for number, piece in enumerate(_PLACEHOLDER.split(text)):
        if number % 2 == 0:
            parts += [piece] if piece else []
        elif piece == "IMAGE":
            parts.append(images.pop(0))
        else:
            parts.append(dataclasses.replace(clips.pop(0), is_voice=piece == "VOICE"))
    return MediaPrompt(tuple(parts), opens, name)


def encode_media_prompt(
    prompt: MediaPrompt, tokenizer: MediaTokenizer, formats: MediaFormats
) -> EncodedPrompt:
    """The prompt's ids and media, checked.

    Raises:
      UserError: for media of a wrong size, rate or length, and kinds of media that the model has
        not, naming the prompt.
    """
    row = encode_sample(Sample(prompt.parts, prompt.name), tokenizer, formats)
    ids = row.tokens.tolist()
    if prompt.opens is not None:
        check_opens(prompt, formats)
        ids.append(tokenizer.marker_id(prompt.opens))
    return EncodedPrompt(tuple(ids), row.images, row.mels, prompt.name)


def check_opens(prompt: MediaPrompt, formats: MediaFormats) -> None:
    """Raises:
    UserError: if the prompt asks for a kind of medium that the model does not make, or for none.
    """
    kind = MEDIUM_AFTER.get(prompt.opens or "")
    if kind is None:
        raise UserError(
            f"{prompt.name}: opens={prompt.opens!r} opens nothing; use one of {list(MEDIUM_AFTER)}."
        )
    for name, own, config in (("image", IMAGE, formats.image), ("audio", AUDIO, formats.audio)):
        if kind == own and not config.enabled:
            raise UserError(
                f"{prompt.name}: ends with {prompt.opens}, and the model has no {name} decoder "
                f"(model.{name}.enabled=False); leave it out, or use another model."
            )


def media_tokenizer(
    config: ModelConfig, tokenizer: Tokenizer | None, description: str = "this model"
) -> MediaTokenizer:
    """The tokenizer, for a model with media.

    Raises:
      UserError: if the model has no parts for media, or its tokenizer no tokens for them.
    """
    if not config.has_media:
        raise UserError(
            f"{description} reads and makes text alone; leave out images, sound and the markers "
            f"{', '.join(MARKERS)}, or use a model with media."
        )
    if not isinstance(tokenizer, MediaTokenizer):
        raise UserError(
            f"{description} has no tokenizer with tokens for media, as those of runs with "
            "data.source='media' have; load such a run."
        )
    return tokenizer


# ------------------------------------------------------------------------------
# Rows of text and media on the host, and the arrays that the model takes of them.


@dataclasses.dataclass
class MediaRow:
    """The media of one text while it is generated.

    Attributes:
      images: those of the prompt, then those that were made.
      mels: the same.
      made: what was made, in order.
    """

    images: list[np.ndarray]
    mels: list[np.ndarray]
    made: list[GeneratedMedium] = dataclasses.field(default_factory=list)

    @classmethod
    def of_prompt(cls, prompt: EncodedPrompt) -> "MediaRow":
        """Before anything is made."""
        return cls(list(prompt.images), list(prompt.mels))

    def add(self, medium: GeneratedMedium) -> None:
        """Once it was made."""
        self.made.append(medium)
        if isinstance(medium, GeneratedImage):
            self.images.append(medium.pixels)
        else:
            self.mels.append(medium.mel)


def media_batch(
    config: ModelConfig,
    follows: np.ndarray,
    images: Sequence[Sequence[np.ndarray]],
    mels: Sequence[Sequence[np.ndarray]],
    num_slots: tuple[int, int],
) -> MediaBatch:
    """Media of rows in slots, as NumPy arrays.

    Args:
      config: of the model.
      follows: int32 [B, T].
      images: of each row; not read if the model takes none.
      mels: the same.
      num_slots: of images and of clips, per row.
    """
    arrays: dict[str, np.ndarray] = {}
    if config.image.enabled:
        shape = (len(follows), num_slots[0])
        pixels = np.zeros((*shape, *config.image.shape), np.float32)
        is_image = np.zeros(shape, bool)
        for row, own in enumerate(images):
            is_image[row, : len(own)] = True
            for slot, image in enumerate(own):
                pixels[row, slot] = image
        arrays |= {"images": pixels, "is_image": is_image}
    if config.audio.enabled:
        shape = (len(follows), num_slots[1])
        frames = (config.audio.max_frames, config.audio.mel.num_mels)
        spectrograms = np.zeros((*shape, *frames), np.float32)
        lengths = np.zeros(shape, np.int32)
        for row, own in enumerate(mels):
            for slot, mel in enumerate(own):
                spectrograms[row, slot, : len(mel)] = mel
                lengths[row, slot] = len(mel)
        arrays |= {"mels": spectrograms, "mel_lengths": lengths}
    return MediaBatch(follows.astype(np.int32), **arrays)


def follows_of(tokens: np.ndarray, lengths: np.ndarray, tokenizer: MediaTokenizer) -> np.ndarray:
    """`MediaBatch.follows` of left-aligned ids, int32 [B, T]."""
    kinds = np.zeros(tokens.shape, np.int32)
    for opening in tokenizer.opening_ids:
        kinds[tokens == opening] = tokenizer.medium_after(opening)
    kinds[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    return kinds


def places_of(config: ModelConfig, num_images: int, mels: Sequence[np.ndarray]) -> int:
    """Places that media take in a sequence."""
    places = num_images * config.image.num_tokens if num_images else 0
    return places + sum(-(-len(mel) // config.audio.downsampling) for mel in mels)


def most_places(config: ModelConfig) -> int:
    """Places of the longest medium that the model makes."""
    return max(kind.num_tokens for kind in (config.image, config.audio) if kind.enabled)


# ------------------------------------------------------------------------------
# Static sizes of a request with media.


@dataclasses.dataclass(frozen=True)
class MediaPlan:
    """Sizes that all rows share.

    Attributes:
      cache: of the key/value cache, for text and media.
      num_prompt_tokens: text of prompts is padded to it.
      num_tokens: text of prompts and of what is generated.
      prompt_slots: of images and of clips in prompts.
      slots: the same with those that are made.
    """

    cache: CachePlan
    num_prompt_tokens: int
    num_tokens: int
    prompt_slots: tuple[int, int]
    slots: tuple[int, int]


def plan_media(
    model: MegaTransformer,
    config: GenerationConfig,
    trained_depth: int | None,
    prompts: Sequence[EncodedPrompt],
    text_rows: int,
) -> MediaPlan:
    """The sizes for prompts and all that may follow.

    Args:
      model: the model.
      config: of the generation; its depth is a number.
      trained_depth: mean iterations in training.
      prompts: of one batch.
      text_rows: rows of the cache that `max_new_tokens` of text may take.

    Raises:
      UserError: if that is more than the cache or the model takes.
    """
    places = most_places(model.config)
    lengths = [sequence_length(model.config, prompt) for prompt in prompts]
    _check_room(model.config, config, max(lengths), places)
    max_media = config.most_media
    # Rows write in turns at worst: each round of text costs all rows its longest.
    new_rows = (max_media + 1) * text_rows + max_media * (1 + places)
    cache = plan_cache(
        model.config,
        config,
        trained_depth,
        longest_prompt=max(lengths),
        new_rows=new_rows,
        platform=model.platform,
    )
    num_prompt_tokens = round_columns(max(len(prompt.ids) for prompt in prompts))
    # A slot at least, since encoders take no empty batches.
    images = max(1, *(len(prompt.images) for prompt in prompts))
    clips = max(1, *(len(prompt.mels) for prompt in prompts))
    return MediaPlan(
        cache,
        num_prompt_tokens,
        # The closing token of a medium at the very end is one more.
        num_prompt_tokens + config.max_new_tokens + 1,
        (images, clips),
        (images + max_media, clips + max_media),
    )


def plan_making(
    config: ModelConfig, prompts: Sequence[EncodedPrompt]
) -> tuple[int, tuple[int, int]]:
    """Tokens of rows, and slots of images and of clips, for the prompts' media and one more each.

    Raises:
      UserError: if a prompt is longer than what the model reads.
    """
    longest = max(sequence_length(config, prompt) for prompt in prompts)
    if longest > config.max_length:
        raise UserError(
            f"the longest prompt takes {longest} places with its media, more than the model's "
            f"max_length={config.max_length}; shorten it."
        )
    images = max(len(prompt.images) for prompt in prompts)
    clips = max(len(prompt.mels) for prompt in prompts)
    num_tokens = round_columns(max(len(prompt.ids) for prompt in prompts))
    return num_tokens, (images + 1, clips + 1)


def sequence_length(config: ModelConfig, prompt: EncodedPrompt) -> int:
    """Places of a prompt with its media."""
    return len(prompt.ids) + places_of(config, len(prompt.images), prompt.mels)


def room_for_text(config: ModelConfig, length: int, max_media: int) -> int:
    """New tokens that fit in the model behind a prompt of `length` places and with new media."""
    return config.max_length - length - max_media * most_places(config)


def _check_room(
    config: ModelConfig, generation: GenerationConfig, length: int, places: int
) -> None:
    max_media, max_new = generation.most_media, generation.max_new_tokens
    room = room_for_text(config, length, max_media)
    if max_new <= room:
        return
    total = length + max_media * places + max_new
    problem = (
        f"{max_new} new tokens after {length} of the longest prompt with its media, and up to "
        f"max_media={max_media} of up to {places} places, make {total}, more than the model's "
        f"max_length={config.max_length}"
    )
    if room >= 1:
        raise ConfigError("max_new_tokens", f"{problem}; set it to {room} or less.")
    raise UserError(f"{problem}; shorten the prompt or lower max_media.")
