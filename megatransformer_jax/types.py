"""Types that every layer shares: the batch, the model's output, the precision policy.

Letters of shapes, used in einsum strings and shape comments everywhere:
`B` batch, `T` query length, `S` key length, `D` model width, `N` query heads, `K` KV heads,
`G` = N/K, `H` head width, `F` feed-forward width, `V` vocabulary, `L` layers, `R` cache slots,
`M` mel bins, `P` patches, `C` channels.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp

# NumPy arrays as the data side makes them, JAX arrays once they are on the mesh.
HostOrDeviceArray = typing.Any


# Kinds of media, as `MediaBatch.follows` names them.
NO_MEDIUM, IMAGE, AUDIO = 0, 1, 2


class MediaBatch(typing.NamedTuple):
    """Images and sound of a batch, in slots: the n-th image of a row is in its slot n.

    Where media stand among the tokens is in `follows`: a medium's embeddings come right after the
    token, which is an opening one such as <|IMAGE|>, and before the next, the closing one. Slots
    that a row does not use hold zeros. A model without images gets None for theirs, and the same
    with sound.
    """

    follows: HostOrDeviceArray  # int32 [B, T], NO_MEDIUM, IMAGE or AUDIO
    images: HostOrDeviceArray = None  # float32 [B, I, height, width, C] in [-1, 1]
    is_image: HostOrDeviceArray = None  # bool [B, I], False for unused slots
    is_drawn: HostOrDeviceArray = None  # bool [B, I], images that the decoder learns to draw
    mels: HostOrDeviceArray = None  # float32 [B, A, F, M], normalised log-mel; 0 beyond the clip
    mel_lengths: HostOrDeviceArray = None  # int32 [B, A], frames; 0 for unused slots
    is_spoken: HostOrDeviceArray = None  # bool [B, A], clips that the decoder learns to make
    task: HostOrDeviceArray = None  # int32 [B], number of the row's task, for metrics only


class Batch(typing.NamedTuple):
    """One batch. Text arrays are [B, T]; targets are aligned, not shifted.

    `targets[b, t]` is what position t must predict. `segment_ids` are 1, 2, ... for the documents
    of a packed row and 0 for padding; attention never crosses segments. `positions` count from 0
    in each document. `loss_mask` is 1.0 where the position counts in the loss, else 0.0. With
    media, text arrays hold the text alone, opening and closing tokens included, and the model
    works out where everything is in the sequence that has the media in it.

    Examples:
      >>> import numpy as np
      >>> rows, length = 8, 64
      >>> ids = np.tile(np.arange(length + 1, dtype=np.int32), (rows, 1))
      >>> ones = np.ones((rows, length), np.int32)
      >>> positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
      >>> batch = mt.Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, positions)
      >>> int(batch.targets[0, 0]), batch.tokens.shape  # `Trainer.step` takes it.
      (1, (8, 64))
    """

    tokens: HostOrDeviceArray  # int32 [B, T]
    targets: HostOrDeviceArray  # int32 [B, T]
    loss_mask: HostOrDeviceArray  # float32 [B, T]
    segment_ids: HostOrDeviceArray  # int32 [B, T]
    positions: HostOrDeviceArray  # int32 [B, T]
    media: MediaBatch | None = None


class WaveformBatch(typing.NamedTuple):
    """Pieces of clips, for a vocoder. Samples beyond a piece's frames are 0."""

    waveforms: HostOrDeviceArray  # float32 [B, F * hop_samples] in [-1, 1]
    lengths: HostOrDeviceArray  # int32 [B], frames; 0 for a row of padding


class ImageBatch(typing.NamedTuple):
    """Images, for an autoencoder."""

    images: HostOrDeviceArray  # float32 [B, height, width, C] in [-1, 1]


class ModelOutput(typing.NamedTuple):
    """What a forward pass returns."""

    logits: jax.Array  # float32 [B, T, V]
    # [B, T, D] core output after the final norm (prelude output if no core); with media, [B, S, D]
    latent: jax.Array
    # With media: 'image' and 'audio', what the decoders of the slots read (models/decoders).
    conditions: typing.Any = None


@dataclasses.dataclass(frozen=True)
class DTypePolicy:
    """Types by role. Parameters, norms, softmax, logits and losses stay float32."""

    param: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))
    compute: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))

    @classmethod
    def from_precision(cls, precision: str, platform: str) -> "DTypePolicy":
        """The policy for `train.precision` on a platform ('cpu', 'gpu', 'tpu')."""
        if precision == "auto":
            precision = "float32" if platform == "cpu" else "bfloat16"
        return cls(compute=jnp.dtype(precision))
