"""Prompts with images in a batch whose texts come and go: where everything stands, and its vectors.

An image takes places in its sequence behind the token that opens it, and the core reads its
encoder's vectors there in place of a prelude. Prompts with images are read by a program of their
own, chunk by chunk as those of text are, so images may be cut between two chunks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.types import IMAGE, NO_MEDIUM, MediaBatch


@dataclasses.dataclass(frozen=True)
class PromptPlaces:
    """The places of a prompt with images, on the host.

    Attributes:
      ids: int32 [n], tokens; 0 at places of images.
      is_image: bool [n].
      starts: the first place of each image.
    """

    ids: np.ndarray
    is_image: np.ndarray
    starts: tuple[int, ...]


def prompt_places(
    config: ModelConfig, tokenizer: Tokenizer | None, ids: Sequence[int], images: Sequence[Any]
) -> PromptPlaces:
    """Where the tokens and the images of a prompt stand.

    Args:
      config: of the model.
      tokenizer: of the model.
      ids: the prompt, an opening and a closing token per image.
      images: float32 [height, width, C] each, as the model's.

    Raises:
      UserError: if the model reads no images, they are not as many as the prompt says, or of
        another size; or the prompt has other media, or ends within one.
    """
    if not config.image.enabled or not isinstance(tokenizer, MediaTokenizer):
        raise UserError("this model reads no images; send text alone.")
    placed = [tokenizer.medium_after(token) for token in ids]
    if placed.count(IMAGE) != len(images):
        raise UserError(
            f"the prompt has places for {placed.count(IMAGE)} images, and {len(images)} are given; "
            "give one per place."
        )
    if set(placed) - {IMAGE, NO_MEDIUM} or placed[-1] != NO_MEDIUM:
        raise UserError("prompts in a batch have text and images alone, and end with text.")
    for image in images:
        if np.shape(image) != config.image.shape:
            raise UserError(f"an image is {np.shape(image)}, and the model's {config.image.shape}.")
    size = config.image.num_tokens
    tokens, is_image, starts = list[int](), list[bool](), list[int]()
    for token, medium in zip(ids, placed, strict=True):
        tokens.append(token)
        is_image.append(False)
        if medium == IMAGE:
            starts.append(len(tokens))
            tokens += [0] * size
            is_image += [True] * size
    return PromptPlaces(np.array(tokens, np.int32), np.array(is_image), tuple(starts))


@struct.dataclass
class PlacedImages:
    """A prompt with images as its row's program reads it; C is the batch's capacity.

    Attributes:
      ids: as of `PromptPlaces`, padded.
      is_image: the same.
      vectors: what stands at the images' places.
    """

    # Any because the host gives them too.
    ids: Any  # int32 [C]
    is_image: Any  # bool [C]
    vectors: Any  # [C, D]


def embed_image(
    model: MegaTransformer,
    params: Any,
    vectors: Float[Array, "C D"],
    pixels: Float[Array, "height width C2"],
    start: Int[Array, ""],
) -> Float[Array, "C D"]:
    """The vectors of a prompt's images with those of one more, from place `start` on."""
    params = gather_weights(model, params)
    slot: Any = {"images": pixels[None, None], "is_image": jnp.ones((1, 1), bool)}
    if model.config.audio.enabled:
        audio = model.config.audio
        frames = (1, 1, audio.max_frames, audio.mel.num_mels)
        slot |= {"mels": jnp.zeros(frames), "mel_lengths": jnp.zeros((1, 1), jnp.int32)}
    media = MediaBatch(jnp.full((1, 1), IMAGE, jnp.int32), **slot)

    def encode(module: Any) -> jax.Array:
        return cast(jax.Array, module.media.encode(media, True, fills_slots=True)[0])

    encoded: Any = model.apply({"params": params}, method=encode)
    return jax.lax.dynamic_update_slice(vectors, encoded[0, 0].astype(vectors.dtype), (start, 0))
