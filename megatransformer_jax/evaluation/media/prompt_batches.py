"""Batches whose rows end where a medium is to be made, from prompts."""

from collections.abc import Sequence

import numpy as np

from megatransformer_jax.data.media.encoding import RowShape, check_fits, encode_sample, make_batch
from megatransformer_jax.data.media.records import AudioPart, ImagePart, MediaFormats, Sample
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.types import AUDIO, IMAGE, Batch


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
    raise ValueError(f"kind {kind} is no medium; give IMAGE={IMAGE} or AUDIO={AUDIO}")
