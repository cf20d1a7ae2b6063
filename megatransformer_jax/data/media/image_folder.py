"""Images in a folder of one's own."""

from PIL import Image

from megatransformer_jax.data.media.folders import IMAGE_FOLDER, item_text, list_folder
from megatransformer_jax.data.media.image_fitting import ImageFitter
from megatransformer_jax.data.media.records import ImageRecord
from megatransformer_jax.data.sources.record import BadRecord


class ImageFolder:
    """The images that captions.jsonl lists, or those with a .txt beside them.

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
        try:
            with Image.open(item.path) as image:
                image.load()
                pixels = self._fitter.fit(image, where)
        # Pillow raises these, and more of its own below them, for files that are cut off or no
        # image, and SyntaxError for some broken PNG files.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return BadRecord(
                where, f"cannot be read as an image ({error}). Mend the file, or delete the record."
            )
        if isinstance(pixels, BadRecord):
            return pixels
        return ImageRecord(pixels, (text,), (text,), where)
