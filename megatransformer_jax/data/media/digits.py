"""scikit-learn's handwritten digits, with captions."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.media.image_fitting import ImageFitter
from megatransformer_jax.data.media.records import ImageRecord
from megatransformer_jax.data.sources.record import BadRecord

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{word}",
    "{article} {word}",
    "the number {digit}",
    "a handwritten {word}",
    "the digit {digit}",
    "{digit}",
    "draw {article} {word}",
    "a picture of {article} {word}",
)


class Digits:
    """1797 images, [8, 8, 1], made to fit the model's size if they are told to.

    Attributes:
      labels: int64 [1797], the digit of each.

    Raises:
      ConfigError: if the model's images have another size, and `on_wrong_size` is 'error'.
    """

    def __init__(self, image: ImageConfig, caption_style: str, on_wrong_size: str):
        digits = load_digits()
        self.labels: np.ndarray = digits.target
        self._pixels = self._fitted(digits.images, image, on_wrong_size)
        templates = TEMPLATES if caption_style == "varied" else TEMPLATES[:1]
        self._prompts = [
            tuple(
                template.format(article="an" if digit == 8 else "a", word=word, digit=digit)
                for template in templates
            )
            for digit, word in enumerate(WORDS)
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> ImageRecord | BadRecord:
        label = int(self.labels[index])
        return ImageRecord(
            self._pixels[index], self._prompts[label], (WORDS[label],), f"digits, image {index}"
        )

    @staticmethod
    def _fitted(images: np.ndarray, image: ImageConfig, on_wrong_size: str) -> np.ndarray:
        """Values 0 to 16 as float32 in [-1, 1]."""
        own = (images / 8 - 1).astype(np.float32)[..., None]
        if image.shape == own.shape[1:]:
            return own
        fitter = ImageFitter(image, on_wrong_size)
        fitted = []
        for pixels in images:
            grey = Image.fromarray(np.clip(pixels * 16, 0, 255).astype(np.uint8))
            result = fitter.fit(grey, "digits")
            if isinstance(result, BadRecord):
                raise ConfigError("model.image", result.problem)
            fitted.append(result)
        return np.stack(fitted)
