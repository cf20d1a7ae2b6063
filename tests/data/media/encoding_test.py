"""Samples become rows: order, targets, masks, slots; what does not fit is an error."""

import warnings

import numpy as np
import pytest

from megatransformer_jax.config.audio import AudioConfig, MelConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.data.media.encoding import (
    MediaCountError,
    RowShape,
    SampleError,
    check_fits,
    check_media,
    check_prompt,
    encode_sample,
    make_batch,
)
from megatransformer_jax.data.media.records import AudioPart, ImagePart, MediaFormats, Sample
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.mel import normalized_mel
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.types import AUDIO, IMAGE, Batch

TOKENIZER = MediaTokenizer(BytesTokenizer())
MEL = MelConfig(
    sample_rate_hz=4000, num_mels=8, fft_samples=128, window_samples=128, hop_samples=64
)
FORMATS = MediaFormats(
    ImageConfig(enabled=True, height=4, width=6, channels=1, patch_size=2),
    AudioConfig(enabled=True, mel=MEL, max_frames=8),
)
SHAPE = RowShape(sequence_length=20, images=2, audio=2)
PIXELS = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6, 1)
SOUND = np.sin(np.arange(5 * 64, dtype=np.float32))
SAMPLE = Sample(
    (
        "ab",
        ImagePart(PIXELS, is_target=True),
        "c",
        AudioPart(SOUND, 4000, is_voice=True),
        AudioPart(SOUND[:100], 4000, is_voice=False, is_target=True),
        "d",
    ),
    "mine.jsonl, line 3",
)


@pytest.fixture(scope="module")
def batch() -> Batch:
    row = encode_sample(SAMPLE, TOKENIZER, FORMATS)
    check_fits(row, SAMPLE.name, SHAPE)
    return make_batch([row, None], [2, 0], SHAPE, FORMATS, TOKENIZER.pad_id)


def test_text_is_compact_and_predicts_what_comes_next_but_not_after_opening_tokens(
    batch: Batch,
) -> None:
    ids = TOKENIZER.encode_with_media(
        "ab<|IMAGE|><|/IMAGE|>c<|VOICE|><|/VOICE|><|AUDIO|><|/AUDIO|>d"
    )
    size = len(ids) + 1
    np.testing.assert_array_equal(batch.tokens[0, :size], [1, *ids])
    np.testing.assert_array_equal(batch.targets[0, :size], [*ids, 2])
    follows = [0, 0, 0, IMAGE, 0, 0, AUDIO, 0, AUDIO, 0, 0]
    np.testing.assert_array_equal(batch.media.follows[0, :size], follows)
    np.testing.assert_array_equal(batch.loss_mask[0, :size], np.equal(follows, 0))
    np.testing.assert_array_equal(batch.positions[0, :size], np.arange(size))
    np.testing.assert_array_equal(batch.segment_ids[0], [1] * size + [0] * (20 - size))
    for name in ("tokens", "targets", "loss_mask", "positions"):
        assert not getattr(batch, name)[0, size:].any()
        assert not getattr(batch, name)[1].any()


def test_media_are_in_the_first_slots_in_their_order(batch: Batch) -> None:
    media = batch.media
    np.testing.assert_array_equal(media.is_image, [[True, False], [False, False]])
    np.testing.assert_array_equal(media.is_drawn, [[True, False], [False, False]])
    np.testing.assert_array_equal(media.images[0, 0], PIXELS)
    assert not media.images[0, 1].any() and not media.images[1].any()
    np.testing.assert_array_equal(media.mel_lengths, [[5, 2], [0, 0]])
    np.testing.assert_array_equal(media.is_spoken, [[False, True], [False, False]])
    np.testing.assert_array_equal(media.mels[0, 0, :5], normalized_mel(SOUND, MEL))
    np.testing.assert_array_equal(media.mels[0, 1, :2], normalized_mel(SOUND[:100], MEL))
    assert not media.mels[0, 0, 5:].any() and not media.mels[1].any()
    np.testing.assert_array_equal(media.task, [2, 0])
    assert media.mels.shape == (2, 2, 8, 8) and media.mels.dtype == np.float32


def test_a_clip_shorter_than_a_window_is_followed_by_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # librosa warns of sound that is too short.
        short = normalized_mel(SOUND[:10], MEL)
    long = normalized_mel(np.pad(SOUND[:10], (0, 630)), MEL)
    assert short.shape == (1, 8)
    np.testing.assert_allclose(short, long[:1], atol=1e-6)


def test_a_medium_that_the_model_does_not_have_gets_no_slots() -> None:
    formats = MediaFormats(image=FORMATS.image)
    row = encode_sample(Sample(("a",)), TOKENIZER, formats)
    media = make_batch([row], [0], SHAPE, formats, 0).media
    assert media is not None and media.mels is None and media.mel_lengths is None
    with pytest.raises(SampleError, match=r"^x: has a clip, but model\.audio\.enabled=False"):
        encode_sample(Sample((AudioPart(SOUND, 4000),), "x"), TOKENIZER, formats)
    with pytest.raises(SampleError, match=r"^x: has an image, but model\.image\.enabled=False"):
        encode_sample(Sample((ImagePart(PIXELS),), "x"), TOKENIZER, MediaFormats())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (ImagePart(PIXELS[:3]), "the image is 3x6x1 .* but model.image is 4x6x1"),
        (ImagePart(np.repeat(PIXELS, 3, axis=2)), "the image is 4x6x3"),
        (ImagePart(PIXELS * 2), r"pixels must be finite float32 in \[-1, 1\]"),
        (ImagePart(PIXELS.astype(np.float64)), "these are float64"),
        (ImagePart(PIXELS * np.float32(np.nan)), "pixels must be finite"),
        (AudioPart(SOUND, 8000), "8000 samples per second, but .*sample_rate_hz=4000"),
        (AudioPart(np.stack([SOUND, SOUND], 1), 4000), r"shape \(320, 2\); it must be mono"),
        (AudioPart(SOUND[:0], 4000), "at least one sample"),
        (AudioPart(SOUND * 2, 4000), r"samples must be finite float32 in \[-1, 1\]"),
        (AudioPart(np.tile(SOUND, 2), 4000), r"10 frames \(0.16 s\), but .*max_frames=8"),
    ],
)
def test_media_that_do_not_fit_are_named_errors(part: object, message: str) -> None:
    with pytest.raises(SampleError, match=rf"^photo 7: .*{message}"):
        encode_sample(Sample(("a", part), "photo 7"), TOKENIZER, FORMATS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (RowShape(10, 2, 2), "has 11 tokens, but a row has room for 10. Raise data.sequence_leng"),
        (RowShape(11, 0, 2), "has 1 images, but a row has room for 0"),
        (RowShape(11, 1, 1), "has 2 clips, but a row has room for 1. Raise data.media.audio_per"),
    ],
)
def test_more_than_fits_is_an_error_and_never_cut(shape: RowShape, message: str) -> None:
    row = encode_sample(SAMPLE, TOKENIZER, FORMATS)
    with pytest.raises(SampleError, match=f"^mine.jsonl, line 3: {message}"):
        check_fits(row, SAMPLE.name, shape)


def test_media_and_placeholders_are_compared(batch: Batch) -> None:
    check_media(batch, TOKENIZER)
    media = batch.media
    assert media is not None
    no_image = batch._replace(media=media._replace(is_image=np.zeros((2, 2), bool)))
    with pytest.raises(MediaCountError, match="row 0: has places for 1 images, but 0 images are"):
        check_media(no_image, TOKENIZER)
    second_slot = batch._replace(media=media._replace(is_image=media.is_image[:, ::-1]))
    with pytest.raises(MediaCountError, match=r"row 0: its images are in slots \[1\]"):
        check_media(second_slot, TOKENIZER)
    extra = np.array([[5, 2], [3, 0]])
    with pytest.raises(MediaCountError, match="row 1: has places for 0 clips, but 1 clips"):
        check_media(batch._replace(media=media._replace(mel_lengths=extra)), TOKENIZER)
    moved = np.roll(media.follows, 1, axis=1)
    with pytest.raises(MediaCountError, match="row 0: `follows` is 0 at position 3"):
        check_media(batch._replace(media=media._replace(follows=moved)), TOKENIZER)
    with pytest.raises(ValueError, match="has no media"):
        check_media(batch._replace(media=None), TOKENIZER)


def test_prompts_need_a_medium_for_each_placeholder_except_one_to_make() -> None:
    ids = TOKENIZER.encode_with_media("<|IMAGE|><|/IMAGE|> like <|VOICE|>")
    check_prompt(ids, 1, 0, TOKENIZER, "prompt 0")
    with pytest.raises(MediaCountError, match=r"^prompt 0: has places for 1 images, but 2 images"):
        check_prompt(ids, 2, 0, TOKENIZER, "prompt 0")
    with pytest.raises(MediaCountError, match="has places for 0 clips, but 1 clips"):
        check_prompt(ids, 1, 1, TOKENIZER, "prompt 0")
