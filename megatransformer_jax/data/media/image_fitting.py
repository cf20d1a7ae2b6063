"""Images of any size and number of channels become the model's, or an error says why not."""

import numpy as np
from PIL import Image, ImageOps

from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.data.media.counted_note import CountedNote
from megatransformer_jax.data.sources.record import BadRecord

# How Pillow calls images of so many channels.
MODES = {1: "L", 3: "RGB"}


class ImageFitter:
    """Does what `data.media.images.on_wrong_size` says.

    Attributes:
      note: counts the images that were changed.
    """

    def __init__(self, image: ImageConfig, on_wrong_size: str):
        self._image = image
        self._resizes = on_wrong_size == "resize"
        self.note = CountedNote(f"images resized or converted to {_size(image.shape)}")

    def fit(self, image: Image.Image, where: str) -> np.ndarray | BadRecord:
        """Pixels as float32 [height, width, C] in [-1, 1].

        An image with a palette counts as RGB, one of 16 bits as grey. With 'resize' the largest
        part in the middle that has the model's proportions is scaled; transparent places become
        white.
        """
        image = _plain(image)
        shape = (image.height, image.width, len(image.getbands()))
        if shape == self._image.shape:
            return _to_float(image)
        mode = MODES.get(self._image.channels)
        if not self._resizes or mode is None:
            return BadRecord(
                where,
                f"the image is {_size(shape)} (height x width x channels), but model.image is "
                f"{_size(self._image.shape)}. "
                + (
                    "Resize it, set data.media.images.on_wrong_size='resize', or change "
                    "model.image."
                    if mode
                    else "Set model.image.channels to 1 or 3."
                ),
            )
        self.note.add(f"{where}, {_size(shape)}")
        image = _opaque(image).convert(mode)
        size = (self._image.width, self._image.height)
        return _to_float(ImageOps.fit(image, size, Image.Resampling.LANCZOS))


def _plain(image: Image.Image) -> Image.Image:
    """The same with its rotation applied, and a mode that has 8 bits per channel."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        scaled = np.asarray(image, np.float64) / 257
        return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode == "1":
        return image.convert("L")
    return image.convert("RGB") if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") else image


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA"):
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _to_float(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, np.float32) / np.float32(127.5) - 1
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
