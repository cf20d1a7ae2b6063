"""Files and texts of what a model made and said, from the arrays alone."""

import numpy as np

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.evaluation.media.making import Answered, Made
from megatransformer_jax.runs.tasks.media import present
from megatransformer_jax.types import AUDIO, IMAGE

TOKENIZER = MediaTokenizer(BytesTokenizer())
MEL = MelConfig(
    sample_rate_hz=8000, num_mels=4, fft_samples=128, window_samples=128, hop_samples=64
)
LENGTH = 10


def row(text, marker):
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.marker_id(marker)]
    follows = [0] * (len(ids) - 1) + [AUDIO if marker == "<|VOICE|>" else IMAGE]
    pad = [0] * (LENGTH - len(ids))
    return np.array(ids + pad), np.array(follows + pad)


def ids_of(*texts):
    rows = [[*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in texts]
    return np.array([ids + [500] * (LENGTH - len(ids)) for ids in rows])


def answered(said, right, media, lengths=None):
    """The last row is none; all positions are answers."""
    mask = np.array([[i <= len(text) for i in range(LENGTH)] for text in right], np.float32)
    exists = np.array([True] * (len(said) - 1) + [False])
    places = np.ones((len(said), LENGTH), bool)
    return Answered(exists, places, ids_of(*said), ids_of(*right), mask, media, lengths)


def test_media_stand_beside_their_texts_and_missing_rows_are_left_out():
    tokens, follows = map(
        np.stack, zip(row("two", "<|IMAGE|>"), row("x", "<|IMAGE|>"), strict=True)
    )
    images = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 8, 8, 1)).astype(np.float32)
    drawn = Made(np.array([True, False]), tokens, follows, images, None, images, None)
    words, voices = map(np.stack, zip(row("hi", "<|VOICE|>"), row("ho", "<|VOICE|>"), strict=True))
    mels = np.random.default_rng(1).uniform(-1, 0, (2, 12, 4)).astype(np.float32)
    frames = np.array([5, 12])
    spoken = Made(np.array([True, True]), words, voices, mels, frames, mels, frames[::-1])
    samples = present(
        {"image": drawn, "audio": spoken},
        {
            "image": answered(["one", "two", "six"], ["one", "ten", "six"], images[[0, 1, 1]]),
            "audio": answered(["hey", "ho"], ["hi", "ho"], mels, frames),
        },
        TOKENIZER,
        MEL,
        seed=3,
    )
    assert set(samples.images) == {"drawn_0", "drawn", "captioned", "mels_0", "mels_1"}
    assert all(image.dtype == np.uint8 for image in samples.images.values())
    assert {name: len(clip) for name, clip in samples.clips.items()} == {
        "spoken_0": 5 * 64,
        "spoken_1": 12 * 64,
    }
    assert samples.sample_rate_hz == 8000
    assert samples.texts == {
        "drawn_0": "two",
        "captioned_0": "one [right]",
        "captioned_1": "two [wrong: ten]",
        "spoken_0": "hi",
        "spoken_1": "ho",
        "transcribed_0": "hey [wrong: hi]",
    }


def test_a_batch_without_such_rows_shows_nothing():
    tokens, follows = map(np.stack, zip(row("two", "<|IMAGE|>"), strict=True))
    images = np.zeros((1, 8, 8, 1), np.float32)
    none = Made(np.array([False]), tokens, follows, images, None, images, None)
    samples = present(
        {"image": none}, {"image": answered(["a"], ["b"], images)}, TOKENIZER, MEL, seed=0
    )
    assert not samples.images and not samples.clips and not samples.texts
