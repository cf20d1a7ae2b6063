"""Crops of scikit-learn's two photographs, with captions that say which and where."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.augmentation.random_draws import Purpose, generator_of
from megatransformer_jax.data.media.image_fitting import MODES
from megatransformer_jax.data.media.records import ImageRecord
from megatransformer_jax.data.sources.record import BadRecord

SUBJECTS = {"china.jpg": "a Chinese palace", "flower.jpg": "a flower"}
# Smallest height of a crop, as a share of the largest that has the model's proportions.
MIN_SCALE = 0.25
ROWS, COLUMNS = ("upper", "middle", "lower"), ("left", "middle", "right")


class Photographs:
    """Crop n is a function of (seed, n). Crops overlap, held-out ones with those of training.

    Raises:
      ConfigError: if the model's images are neither grey nor RGB.
    """

    def __init__(self, image: ImageConfig, num_crops: int, seed: int):
        if image.channels not in MODES:
            raise ConfigError(
                "model.image.channels",
                f"{image.channels} suits no photograph; set it to 3, or to 1 for grey.",
            )
        samples = load_sample_images()
        names = [name.rsplit("/", maxsplit=1)[-1] for name in samples.filenames]
        self._subjects = [SUBJECTS[name] for name in names]
        self._photographs = [
            Image.fromarray(pixels).convert(MODES[image.channels]) for pixels in samples.images
        ]
        self._image = image
        self._num_crops = num_crops
        self._seed = seed

    def __len__(self) -> int:
        return self._num_crops

    def __getitem__(self, index: int) -> ImageRecord | BadRecord:
        rng = generator_of(self._seed, index, Purpose.CROPS)
        number = int(rng.integers(len(self._photographs)))
        photograph, image = self._photographs[number], self._image
        largest = min(photograph.height / image.height, photograph.width / image.width)
        scale = largest * (MIN_SCALE + (1 - MIN_SCALE) * rng.random())
        height, width = scale * image.height, scale * image.width
        top = (photograph.height - height) * rng.random()
        left = (photograph.width - width) * rng.random()
        pixels = photograph.resize(
            (image.width, image.height),
            Image.Resampling.BILINEAR,
            box=(left, top, left + width, top + height),
        )
        array = np.asarray(pixels, np.float32) / np.float32(127.5) - 1
        row = ROWS[min(int(3 * (top + height / 2) / photograph.height), 2)]
        column = COLUMNS[min(int(3 * (left + width / 2) / photograph.width), 2)]
        place = "middle" if row == column == "middle" else f"{row} {column}"
        caption = f"the {place} of a photograph of {self._subjects[number]}"
        return ImageRecord(
            array.reshape(image.shape), (caption,), (caption,), f"photographs, crop {index}"
        )
