"""A TFDS data set with images, sound and texts that the test prepares itself.

TFDS makes its Audio feature with TensorFlow alone, so that the sound here is a plain tensor.
"""

import dataclasses
import io
import pickle
from typing import Any

import numpy as np
import PIL.Image
import pytest
from etils import epath

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.media_data import (
    AudioDataConfig,
    ImageDataConfig,
    MediaDataConfig,
)
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.fingerprint import data_fingerprint
from megatransformer_jax.data.media.build import build_audio_source, build_image_source
from megatransformer_jax.data.sources.record import BadRecord

tfds = pytest.importorskip("tensorflow_datasets")

IMAGE = ImageConfig(enabled=True, height=8, width=8, patch_size=2)
MEL = MelConfig(sample_rate_hz=8000)
SOUND = np.arange(-50, 50, dtype=np.int16) * 300


def png(pixels: np.ndarray) -> io.BytesIO:
    """TFDS makes files of arrays with TensorFlow, but takes files as they are."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tfds")

    class TinyMedia(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = epath.Path(folder)
        # TFDS looks for the files of a package where the name has dots.
        __module__ = "tiny_set"

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
                "speech": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                "text": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(4), "test": self._generate_examples(1)}

        def _generate_examples(self, count):
            for number in range(count):
                size = (8, 9 if number == 3 else 8, 3)
                yield (
                    number,
                    {
                        "image": png(np.full(size, 50 * number, np.uint8)),
                        "captions": [{"text": f"é {number}"}, {"text": "a square"}],
                        "speech": SOUND + number,
                        "text": "" if number == 2 else f"words {number}",
                    },
                )

    TinyMedia(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def config(data_dir: str, **changes: Any) -> DataConfig:
    shared = {
        "source": "tfds",
        "tfds_name": "tiny_media",
        "tfds_data_dir": data_dir,
        "tfds_validation_split": "test",
    }
    changes = {"tfds_sample_rate_hz": 8000} | changes
    known = {field.name for field in dataclasses.fields(ImageDataConfig)}
    image_options = {name: value for name, value in changes.items() if name in known}
    audio_options = {name: value for name, value in changes.items() if name not in known}
    media = MediaDataConfig(
        tasks=("caption=1", "transcribe=1"),
        images=ImageDataConfig(**shared | image_options),
        audio=AudioDataConfig(**shared | audio_options),
    )
    return DataConfig(source="media", tokenizer=TokenizerConfig(kind="bytes"), media=media)


def test_images_have_captions_and_those_of_another_size_are_bad(data_dir: str) -> None:
    source = pickle.loads(pickle.dumps(build_image_source(config(data_dir), IMAGE, "train")))
    assert len(source) == 4
    assert source[1].captions == source[1].prompts == ("é 1", "a square")
    np.testing.assert_allclose(source[1].pixels, 50 / 127.5 - 1, atol=1e-6)
    assert isinstance(source[3], BadRecord)
    assert "tiny_media[train], record 3: the image is 8x9x3" in str(source[3])
    assert len(build_image_source(config(data_dir), IMAGE, "validation")) == 1


def test_sound_has_the_rate_that_the_set_says(data_dir: str) -> None:
    source = build_audio_source(config(data_dir), MEL, "train")
    first = source[0]
    assert not isinstance(first, BadRecord)
    assert (first.transcript, first.is_voice) == ("words 0", True)
    np.testing.assert_allclose(first.waveform, SOUND / 32768, atol=1e-6)
    assert "record 2: has no text in 'text'" in str(source[2])
    wrong = build_audio_source(config(data_dir), MelConfig(sample_rate_hz=16000), "train")
    assert "1 channel and 8000 samples per second" in str(wrong[0])


def test_a_text_that_is_not_utf_8_is_a_bad_record(data_dir: str) -> None:
    source = build_audio_source(config(data_dir), MEL, "train")
    source._records = [{"speech": SOUND, "text": b"caf\xe9"}]
    assert "record 0: byte 0xe9 at offset 3 is not UTF-8" in str(source[0])


def test_parts_are_held_out_without_a_validation_split(data_dir: str) -> None:
    settings = config(data_dir, tfds_validation_split=None)
    train, held_out = (
        build_image_source(settings, IMAGE, each) for each in ("train", "validation")
    )
    assert (len(train), len(held_out)) == (3, 1)
    alone = config(data_dir, tfds_split="test", tfds_validation_split=None)
    with pytest.raises(
        ConfigError, match=r"images\.tfds_split: .* 1 record, .*tfds_validation_split"
    ):
        build_image_source(alone, IMAGE, "train")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"image_field": "pic"},
            ConfigError,
            r"images\.image_field: 'pic' is not a feature of tiny_",
        ),
        (
            {"caption_field": "captions/x"},
            ConfigError,
            r"caption_field: 'captions/x' is not a featu",
        ),
        (
            {"transcript_field": "said"},
            ConfigError,
            r"audio\.transcript_field: 'said' is not a feat",
        ),
        (
            {"tfds_sample_rate_hz": None},
            ConfigError,
            r"tfds_sample_rate_hz: is None, and tiny_media",
        ),
        ({"tfds_split": "none"}, UserError, r"tiny_media\[none\]: TFDS cannot read it"),
    ],
)
def test_what_is_not_there_is_named(
    changes: dict[str, Any], error: type[Exception], message: str, data_dir: str
) -> None:
    settings = config(data_dir, **changes)
    with pytest.raises(error, match=message):
        build_image_source(settings, IMAGE, "train")
        build_audio_source(settings, MEL, "train")


def test_the_fingerprint_counts_records(data_dir: str) -> None:
    words = data_fingerprint(config(data_dir))
    assert "images: tiny_media[train] has 4 records" in words
    assert "audio: tiny_media[train] has 4 records" in words


def test_a_set_that_needs_tensorflow_says_so(
    data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def builder(*args: Any, **options: Any) -> None:
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(tfds, "builder", builder)
    with pytest.raises(UserError, match="TFDS needs tensorflow for this set"):
        build_audio_source(config(data_dir), MEL, "train")
