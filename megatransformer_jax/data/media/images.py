"""Images with captions: scikit-learn's digits and photographs, and folders; fitted to the model."""

import numpy as np
from PIL import Image, ImageOps

from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.media.folders import IMAGE_FOLDER, CountedNote, item_text, list_folder
from megatransformer_jax.data.media.records import ImageRecord
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.extras import import_extra
from megatransformer_jax.streams import Purpose, generator_of

# ------------------------------------------------------------------------------
# scikit-learn's handwritten digits, with captions.

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
        datasets = import_extra("sklearn.datasets", "media", "images of digits")
        digits = datasets.load_digits()
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


# ------------------------------------------------------------------------------
# Crops of scikit-learn's two photographs, with captions that say which and where.

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
        datasets = import_extra("sklearn.datasets", "media", "photographs")
        samples = datasets.load_sample_images()
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


# ------------------------------------------------------------------------------
# Images of any size and number of channels become the model's, or an error says why not.

# How Pillow calls images of so many channels.
MODES = {1: "L", 3: "RGB"}


class ImageFitter:
    """Does what `on_wrong_size` of a section, such as `data.media.images`, says.

    Attributes:
      note: counts the images that were changed.
    """

    def __init__(self, image: ImageConfig, on_wrong_size: str, section: str = "data.media.images"):
        self._image = image
        self._option = f"{section}.on_wrong_size"
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
                    f"Resize it, set {self._option}='resize', or change model.image."
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


# ------------------------------------------------------------------------------
# The user's own images in a folder.


class ImageFolder:
    """The images that captions.jsonl lists, or those with a .txt next to them.

    Raises:
      UserError: see `list_folder`.
    """

    def __init__(self, folder: str, fitter: ImageFitter):
        self._items = list_folder(folder, IMAGE_FOLDER)
        self._fitter = fitter

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> ImageRecord | BadRecord:
        item = self._items[index]
        where = item.path if item.text is None else f"{item.path} ({item.where})"
        try:
            text = item_text(item)
        except ValueError as error:
            return BadRecord(where, str(error))
        pixels = read_image(item.path, self._fitter, where)
        if isinstance(pixels, BadRecord):
            return pixels
        return ImageRecord(pixels, (text,), (text,), where)


def read_image(path: str, fitter: ImageFitter, where: str) -> np.ndarray | BadRecord:
    """The pixels of a file, float32 [height, width, C] in [-1, 1], fitted to the model."""
    try:
        with Image.open(path) as image:
            image.load()
            return fitter.fit(image, where)
    # Pillow raises these, and more of its own below them, for files that are cut off or no
    # image, and SyntaxError for some broken PNG files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return BadRecord(
            where, f"cannot be read as an image ({error}). Fix the file, or delete the record."
        )
