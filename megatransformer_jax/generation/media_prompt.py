"""Prompts of text, images and sound, and how a text with markers becomes one."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.media.encoding import check_prompt, encode_sample
from megatransformer_jax.data.media.records import AudioPart, ImagePart, MediaFormats, Part, Sample
from megatransformer_jax.data.media_tokenizer import MEDIUM_AFTER, MediaTokenizer
from megatransformer_jax.types import AUDIO, IMAGE

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


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it.

    Attributes:
      ids: the start token, text, opening and closing tokens.
      images: each float32 [height, width, C], in the order of their opening tokens.
      mels: each float32 [frames, M].
    """

    ids: tuple[int, ...]
    images: tuple[np.ndarray, ...] = ()
    mels: tuple[np.ndarray, ...] = ()


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
    return EncodedPrompt(tuple(ids), row.images, row.mels)


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
