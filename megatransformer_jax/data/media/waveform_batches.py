"""Random pieces of clips, of one length, for training a vocoder."""

import dataclasses

import numpy as np

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.vocoder import VocoderConfig
from megatransformer_jax.data.batches import Share
from megatransformer_jax.data.media.build import build_audio_source
from megatransformer_jax.data.media.medium_batches import medium_pipeline
from megatransformer_jax.data.media.records import AudioRecord
from megatransformer_jax.data.pipeline import Pipeline
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.types import WaveformBatch


@dataclasses.dataclass(frozen=True)
class WaveformSegments:
    """A piece of each clip, from a place that is drawn; a clip that is shorter is taken whole.

    Attributes:
      frames: of a piece.
      hop_samples: samples of a frame.
    """

    frames: int
    hop_samples: int

    def row(self, record: AudioRecord, rng: np.random.Generator) -> np.ndarray | BadRecord:
        """At most `frames` frames; whole ones, filled up with zeros at a clip's end."""
        waveform, length = record.waveform, self.frames * self.hop_samples
        if not len(waveform):
            return BadRecord(record.where, "the clip has no samples. Delete the record.")
        start = int(rng.integers(max(len(waveform) - length, 0) + 1))
        piece = waveform[start : start + length]
        return np.pad(piece, (0, -len(piece) % self.hop_samples))

    def batch(self, rows: list[np.ndarray], size: int) -> WaveformBatch:
        """Arrays of `size` rows, zeros where there is nothing."""
        waveforms = np.zeros((size, self.frames * self.hop_samples), np.float32)
        lengths = np.zeros(size, np.int32)
        for index, row in enumerate(rows):
            waveforms[index, : len(row)] = row
            lengths[index] = len(row) // self.hop_samples
        return WaveformBatch(waveforms, lengths)


def waveform_pipeline(
    config: DataConfig,
    vocoder: VocoderConfig,
    *,
    split: str,
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """The pieces of `split` for one process: 'train' is endless, 'validation' one pass.

    Args:
      config: with source='media'; `data.media.audio` says where clips come from.
      vocoder: the rate of samples, the hop, and the frames of a piece.
      split: 'train' or 'validation'.
      process_index: which process this is, from 0.
      process_count: how many share each global batch.

    Raises:
      UserError: if the data cannot be read.
    """
    return medium_pipeline(
        build_audio_source(config, vocoder.mel, split),
        WaveformSegments(vocoder.segment_frames, vocoder.mel.hop_samples),
        config,
        split=split,
        share=Share(config.batch_size, process_index, process_count),
    )
