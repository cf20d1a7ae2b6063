import json

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread

from megatransformer_jax.training.media_hook import (
    MediaSampleHook,
    MediaSamples,
    write_media_files,
)
from megatransformer_jax.training.writers import MultiWriter

GREY = np.array([[0.0, 0.5], [0.25, 1.0]], np.float32)[:, :, None]
CLIP = np.sin(np.arange(80, dtype=np.float32) / 5)
SAMPLES = MediaSamples({"drawn": GREY}, {"spoken": CLIP}, {"drawn": "a thrée"}, 8000)


class Recorder(MultiWriter):
    def __init__(self):
        super().__init__(())
        self.written = {}

    def write_images(self, step, images):
        self.written |= {(step, name): image.shape for name, image in images.items()}

    def write_audios(self, step, audios, *, sample_rate):
        self.written |= {(step, n): (clip.shape, sample_rate) for n, clip in audios.items()}

    def write_texts(self, step, texts):
        self.written |= {(step, f"{name} text"): text for name, text in texts.items()}


def test_files_hold_the_samples(tmp_path):
    files = write_media_files(SAMPLES, tmp_path / "new")
    assert [file.name for file in files] == ["drawn.png", "spoken.wav", "texts.jsonl"]
    pixels = imread(files[0])
    np.testing.assert_allclose(pixels[..., :3], np.repeat(GREY, 3, -1), atol=1 / 255)
    waveform, rate = soundfile.read(files[1])
    assert rate == 8000
    np.testing.assert_allclose(waveform, CLIP, atol=1e-4)
    assert json.loads(files[2].read_text()) == {"name": "drawn", "text": "a thrée"}


def test_the_primary_process_writes_and_the_others_only_make(tmp_path):
    steps = []

    def make(state, step):
        steps.append((state, step))
        return SAMPLES

    recorder = Recorder()
    primary = MediaSampleHook(5, make, recorder, tmp_path / "samples")
    assert primary(10, "state", {}) == {}
    assert sorted(file.name for file in (tmp_path / "samples/step_000010").iterdir()) == [
        "drawn.png",
        "spoken.wav",
        "texts.jsonl",
    ]
    assert recorder.written == {
        (10, "samples/drawn"): (2, 2, 1),
        (10, "samples/spoken"): ((1, 80, 1), 8000),
        (10, "samples/drawn text"): "a thrée",
    }
    MediaSampleHook(5, make, recorder, None)(15, "state", {})
    assert len(recorder.written) == 3
    assert steps == [("state", 10), ("state", 15)]


def test_clips_need_a_rate_and_media_their_range(tmp_path):
    with pytest.raises(ValueError, match="sample_rate_hz is None"):
        MediaSamples(clips={"spoken": CLIP})
    with pytest.raises(ValueError, match="spoken: sound with values"):
        write_media_files(MediaSamples(clips={"spoken": 2 * CLIP}, sample_rate_hz=8000), tmp_path)
    with pytest.raises(ValueError, match="drawn: images with values"):
        write_media_files(MediaSamples(images={"drawn": GREY - 1}), tmp_path)
