"""Puts the embeddings of text and of media into one sequence, and takes them out again.

Everything has a static shape, and where things go is data: one compilation serves any number and
order of media. A row's sequence is its text with each medium's vectors right behind the token that
opens it; what is left of the row is padding:

    text      bos  a  <|IMAGE|>             <|/IMAGE|>  b
    sequence  bos  a  <|IMAGE|>  p0 p1 p2 p3  <|/IMAGE|>  b  0 0 ...

Sources are numbered across the three streams laid end to end: T tokens of text, I * P vectors of
image slots, A * Q vectors of audio slots, and one row of zeros. The layout holds for every place of
the sequence the number of its source, and for every source its place; interleaving and
un-interleaving are one gather each.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from megatransformer_jax.types import AUDIO, IMAGE


@struct.dataclass
class Layout:
    """Where everything is in sequences of length S = T + I * P + A * Q. Places of what does not
    exist (padding, unused slots) are S.

    Attributes:
      source: number of the source at every place, see above.
      text_places: place of each token.
      image_places: of each vector of each image slot; I is 0 without images.
      audio_places: of each vector of each audio slot.
      image_openings: of the token that opens each image slot.
      audio_openings: of the token that opens each audio slot.
      segment_ids: document of each place, 0 for padding; a medium is in its opening token's.
      positions: place within the document.
    """

    source: Int[Array, "B S"]
    text_places: Int[Array, "B T"]
    image_places: Int[Array, "B I P"]
    audio_places: Int[Array, "B A Q"]
    image_openings: Int[Array, "B I"]
    audio_openings: Int[Array, "B A"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]

    @property
    def length(self) -> int:
        """Places of a sequence (S)."""
        return self.source.shape[1]

    @property
    def is_medium(self) -> Bool[Array, "B S"]:
        """Places that hold a medium."""
        return (self.source >= self.text_places.shape[1]) & (self.segment_ids > 0)


def interleave_layout(
    follows: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    image_lengths: Int[Array, "B I"],
    audio_lengths: Int[Array, "B A"],
    max_image_length: int,
    max_audio_length: int,
) -> Layout:
    """Where text and media go.

    Args:
      follows: kind of the medium right behind each token (types.IMAGE, types.AUDIO), else 0. The
        n-th of a kind in a row is that kind's slot n; there must be as many as used slots, which
        is checked where batches are made.
      segment_ids: document of each token, 0 for padding, which stands at the end of rows only.
      image_lengths: vectors that each image slot has, 0 if it is not used.
      audio_lengths: the same for audio slots.
      max_image_length: P, vectors that an image slot holds.
      max_audio_length: Q.
    """
    batch_size, num_tokens = follows.shape
    num_images, num_clips = image_lengths.shape[1], audio_lengths.shape[1]
    length = num_tokens + num_images * max_image_length + num_clips * max_audio_length
    is_token = segment_ids > 0
    behind = _behind(follows, IMAGE, image_lengths) + _behind(follows, AUDIO, audio_lengths)
    behind = jnp.where(is_token, behind, 0)
    before = jnp.cumsum(behind, axis=1) - behind
    places = jnp.where(is_token, jnp.arange(num_tokens) + before, length)
    image_openings = _openings(places, follows == IMAGE, num_images, length)
    audio_openings = _openings(places, follows == AUDIO, num_clips, length)
    image_places = _slot_places(image_openings, image_lengths, max_image_length, length)
    audio_places = _slot_places(audio_openings, audio_lengths, max_audio_length, length)
    all_places = jnp.concatenate(
        [places, image_places.reshape(batch_size, -1), audio_places.reshape(batch_size, -1)], axis=1
    )
    rows = jnp.arange(batch_size)[:, None]
    nothing = all_places.shape[1]
    source = jnp.full((batch_size, length), nothing, jnp.int32)
    source = source.at[rows, all_places].set(jnp.arange(nothing, dtype=jnp.int32), mode="drop")
    segments, positions = _documents(places, segment_ids, source < nothing)
    return Layout(
        source,
        places.astype(jnp.int32),
        image_places,
        audio_places,
        image_openings,
        audio_openings,
        segments,
        positions,
    )


def interleave(
    layout: Layout,
    text: Shaped[Array, "B T *D"],
    images: Shaped[Array, "B I P *D"] | None = None,
    audio: Shaped[Array, "B A Q *D"] | None = None,
) -> Shaped[Array, "B S *D"]:
    """The sequence, zeros where there is padding. None stands for zeros.

    Args:
      layout: where everything goes.
      text: a vector, or a number, per token.
      images: the same per place in image slots; what is beyond an image's length is not read.
      audio: the same for audio slots.
    """
    shape, features = layout.source.shape, text.shape[2:]
    streams = [text]
    for media, places in ((images, layout.image_places), (audio, layout.audio_places)):
        if media is None:
            media = jnp.zeros((*places.shape, *features), text.dtype)
        streams.append(media.reshape(shape[0], -1, *features).astype(text.dtype))
    return _gather(streams, layout.source)


def place_media(
    layout: Layout,
    images: Float[Array, "B I P D"] | None = None,
    audio: Float[Array, "B A Q D"] | None = None,
) -> Float[Array, "B S D"]:
    """The media of a sequence at their places, zeros at those of text and of padding.

    At least one kind must be given; one that is None has no slots in the layout.
    """
    batch_size, num_tokens = layout.text_places.shape
    streams = [
        media.reshape(batch_size, -1, media.shape[-1])
        for media in (images, audio)
        if media is not None
    ]
    nothing = sum(stream.shape[1] for stream in streams)
    source = layout.source - num_tokens
    return _gather(streams, jnp.where(source < 0, nothing, source))


def _gather(streams: list[jax.Array], source: jax.Array) -> jax.Array:
    """What `source` [B, S] numbers of streams [B, any, ...] laid end to end, and one zero row."""
    batch_size, _, *features = streams[0].shape
    nothing = jnp.zeros((batch_size, 1, *features), streams[0].dtype)
    index = source.reshape(*source.shape, *(1 for _ in features))
    return jnp.take_along_axis(jnp.concatenate([*streams, nothing], axis=1), index, axis=1)


def take_places(
    sequence: Shaped[Array, "B S *D"], places: Int[Array, "B *slots"]
) -> Shaped[Array, "B *slots_D"]:
    """What stands at the places of each row; zeros for places below 0 or from S on."""
    batch_size, length, *features = sequence.shape
    flat = places.reshape(batch_size, -1)
    # Negative indices would count from the end.
    flat = jnp.where(flat < 0, length, flat).reshape(*flat.shape, *(1 for _ in features))
    taken = jnp.take_along_axis(sequence, flat, axis=1, mode="fill", fill_value=0)
    return taken.reshape(*places.shape, *features)


def window_before(
    layout: Layout, sequence: Float[Array, "B S D"], openings: Int[Array, "B N"], size: int
) -> tuple[Float[Array, "B N C D"], Bool[Array, "B N C"]]:
    """The `size` places of the same document that end with each opening token, and which of them
    there are; zeros for the others and for unused slots."""
    places = openings[:, :, None] + jnp.arange(1 - size, 1)
    places = jnp.where(openings[:, :, None] < layout.length, places, layout.length)
    documents = take_places(layout.segment_ids, places)
    exists = (documents > 0) & (documents == documents[:, :, -1:])
    return jnp.where(exists[..., None], take_places(sequence, places), 0), exists


def _behind(follows: jax.Array, kind: int, lengths: jax.Array) -> jax.Array:
    """Vectors of the medium of this kind behind each token, [B, T]."""
    if lengths.shape[1] == 0:
        return jnp.zeros(follows.shape, jnp.int32)
    is_opening = follows == kind
    slots = jnp.cumsum(is_opening, axis=1) - 1
    own = jnp.take_along_axis(lengths, jnp.clip(slots, 0, lengths.shape[1] - 1), axis=1)
    return jnp.where(is_opening & (slots < lengths.shape[1]), own, 0)


def _openings(places: jax.Array, is_opening: jax.Array, num_slots: int, nowhere: int) -> jax.Array:
    """Place of the token that opens each slot, [B, slots]."""
    rows = jnp.arange(places.shape[0])[:, None]
    slots = jnp.where(is_opening, jnp.cumsum(is_opening, axis=1) - 1, num_slots)
    openings = jnp.full((places.shape[0], num_slots), nowhere, jnp.int32)
    return openings.at[rows, slots].set(places.astype(jnp.int32), mode="drop")


def _slot_places(
    openings: jax.Array, lengths: jax.Array, max_length: int, nowhere: int
) -> jax.Array:
    """Place of each vector of each slot, [B, slots, max_length]."""
    offsets = jnp.arange(max_length, dtype=jnp.int32)
    places = openings[:, :, None] + 1 + offsets
    exists = (offsets < lengths[:, :, None]) & (openings[:, :, None] < nowhere)
    return jnp.where(exists, places, nowhere)


def _documents(
    text_places: jax.Array, text_segments: jax.Array, is_filled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Document of each place and the place within it, both [B, S]."""
    rows = jnp.arange(text_places.shape[0])[:, None]
    length = is_filled.shape[1]
    is_text = jnp.zeros(is_filled.shape, jnp.int32).at[rows, text_places].set(1, mode="drop")
    token = jnp.maximum(jnp.cumsum(is_text, axis=1) - 1, 0)
    segments = jnp.where(is_filled, jnp.take_along_axis(text_segments, token, axis=1), 0)
    changes = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    first = jax.lax.cummax(jnp.where(changes, jnp.arange(length), 0), axis=1)
    positions = jnp.where(is_filled, jnp.arange(length) - first, 0)
    return segments.astype(jnp.int32), positions.astype(jnp.int32)
