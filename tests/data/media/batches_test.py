"""Batches of one medium: exact pieces, the same for all processes, resumable, bad records out."""

import numpy as np
import pytest

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.media_data import AudioDataConfig, MediaDataConfig
from megatransformer_jax.config.vocoder import VocoderConfig
from megatransformer_jax.data.batches import Share
from megatransformer_jax.data.media.batches import (
    MediumBatches,
    WaveformSegments,
    image_pipeline,
    waveform_pipeline,
)
from megatransformer_jax.data.media.records import AudioRecord
from megatransformer_jax.data.sources.record import BadRecord, BadRecordError, BadRecordPolicy

HOP, FRAMES = 4, 3


def clip(length: int, number: int) -> AudioRecord:
    """Samples that tell clip and place."""
    return AudioRecord(number + np.arange(length, dtype=np.float32) / 1000, 100, "", True, "clip")


class Clips(list):
    """A source."""


FOUR = Share(4)


def stream(records, *, share=FOUR, shuffle=True, repeat=True, policy="error"):
    return MediumBatches(
        Clips(records), WaveformSegments(FRAMES, HOP), share, BadRecordPolicy(policy),
        seed=3, shuffle=shuffle, repeat=repeat, num_workers=0,
    )  # fmt: skip


def test_pieces_are_cut_from_all_over_a_clip_and_short_clips_are_filled_up() -> None:
    batches = stream([clip(50, 0), clip(6, 1)], shuffle=False)
    starts = set()
    for _ in range(20):
        waveforms, lengths = next(batches)
        assert waveforms.shape == (4, 12) and waveforms.dtype == np.float32
        np.testing.assert_array_equal(lengths, [3, 2, 3, 2])
        for row in waveforms[::2]:
            np.testing.assert_allclose(np.diff(row), 1e-3, atol=1e-6)
            starts.add(round(float(row[0]) * 1000))
        np.testing.assert_allclose(waveforms[1, :6], 1 + np.arange(6) / 1000, rtol=1e-6)
        np.testing.assert_array_equal(waveforms[1, 6:], 0)
    assert min(starts) < 8 and max(starts) > 30 and max(starts) <= 38


def test_processes_share_batches_and_a_stream_resumes() -> None:
    records = [clip(50, number) for number in range(7)]
    whole = stream(records)
    batches = [next(whole) for _ in range(4)]
    for process in range(2):
        part = stream(records, share=Share(4, process, 2))
        for batch in batches:
            rows = slice(2 * process, 2 * process + 2)
            np.testing.assert_array_equal(next(part).waveforms, batch.waveforms[rows])
    again = stream(records)
    again.set_state({"batch": 2})
    np.testing.assert_array_equal(next(again).waveforms, batches[2].waveforms)
    assert again.get_state() == {"batch": 3}
    assert not np.array_equal(batches[0].waveforms, batches[1].waveforms)


def test_bad_records_are_replaced_and_counted_or_are_an_error() -> None:
    bad = BadRecord("clip 1", "broken.")
    empty = clip(0, 5)
    batches = stream([clip(50, 0), bad, empty], shuffle=False, policy="skip")
    assert all((next(batches).lengths == 3).all() for _ in range(3))
    with pytest.raises(BadRecordError, match="broken"):
        next(stream([bad, clip(50, 0)], shuffle=False))
    last = stream([clip(50, 0)], shuffle=False, repeat=False)
    np.testing.assert_array_equal(next(last).lengths, [3, 0, 0, 0])
    with pytest.raises(StopIteration):
        next(last)


def test_sources_of_media_become_pieces_and_images() -> None:
    def data(task: str, **options):
        return DataConfig(
            source="media", batch_size=2, tokenizer=TokenizerConfig(kind="bytes"),
            media=MediaDataConfig(tasks=(task,), **options),
        )  # fmt: skip

    mel = MelConfig(
        sample_rate_hz=4000, num_mels=8, fft_samples=64, window_samples=64, hop_samples=32
    )
    vocoder = VocoderConfig(mel=mel, segment_frames=5)
    tones = data("speak=1", audio=AudioDataConfig(source="tones", num_tones=40))
    with waveform_pipeline(tones, vocoder, split="train") as batches:
        batch = next(batches)
        assert batch.waveforms.shape == (2, 160) and np.abs(batch.waveforms).max() > 0.01
        np.testing.assert_array_equal(batch.lengths, [5, 5])
    with waveform_pipeline(tones, vocoder, split="validation") as batches:
        assert len(list(batches)) == 1
    image = ImageConfig(height=8, width=8, channels=1, patch_size=1)
    with image_pipeline(data("draw=1"), image, split="train") as batches:
        images = next(batches).images
        assert images.shape == (2, 8, 8, 1) and -1 <= images.min() < images.max() <= 1
