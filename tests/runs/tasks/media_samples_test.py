"""Files and texts of what a model made and said, from the media alone."""

import numpy as np

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.evaluation.media.making import Question
from megatransformer_jax.generation.media_prompt import EncodedPrompt
from megatransformer_jax.generation.request import GeneratedClip, GeneratedImage
from megatransformer_jax.runs.tasks.media import present

MEL = MelConfig(
    sample_rate_hz=8000, num_mels=4, fft_samples=128, window_samples=128, hop_samples=64
)


def question(text, medium, right=""):
    return Question(EncodedPrompt((1,)), text, medium, right)


def test_media_stand_beside_their_texts():
    images = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 8, 8, 1)).astype(np.float32)
    mels = np.random.default_rng(1).uniform(-1, 0, (2, 12, 4)).astype(np.float32)
    samples = present(
        {
            "image": [(question("two", images[0]), GeneratedImage(images[1]))],
            "audio": [
                (question("hi", mels[0]), GeneratedClip(mels[1, :5], True)),
                (question("ho", mels[1, :5]), GeneratedClip(mels[0], True)),
            ],
        },
        {
            "image": [
                (question("", images[0], "one"), "one"),
                (question("", images[1], "ten"), "two"),
            ],
            "audio": [(question("", mels[0], "hi"), "hey")],
        },
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


def test_without_rows_nothing_is_shown():
    samples = present({}, {"image": []}, MEL, seed=0)
    assert not samples.images and not samples.clips and not samples.texts
