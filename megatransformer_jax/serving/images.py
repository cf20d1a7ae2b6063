"""Images in requests: OpenAI's content parts with `data:` URLs, as the pixels that a model reads.

    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo..."}}

No other address is ever fetched: a server that fetches what a request names can be sent to places
that only it can reach.
"""

import base64
import binascii
import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.data.media.images import ImageFitter
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.serving.errors import RequestError

# By the types that data URLs name.
FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF"}
# A small file can hold a very large image; one of a camera has 12 to 48 million pixels.
MAX_PIXELS = 50_000_000
_DATA_URL = re.compile(r"data:image/([a-z]+);base64,", re.IGNORECASE)


def image_of_part(part: Mapping[str, Any], place: str, config: ImageConfig) -> np.ndarray:
    """The pixels of a content part, float32 [height, width, C] in [-1, 1], fitted to the model.

    An image of another size is cut to the model's proportions around its middle, and scaled. Of a
    moving one the first picture is taken.

    Args:
      part: of kind 'image_url'.
      place: of the part, for messages: 'messages[0].content[1]'.
      config: of the model.

    Raises:
      RequestError: if it is no such part, another address than a data URL, or not an image.
    """
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, Mapping) else None
    if given is None or not isinstance(url, str) or set(part) != {"type", "image_url"}:
        raise _bad(
            place,
            'is not an image; give {"type": "image_url", "image_url": {"url": "data:image/png;'
            'base64,..."}}.',
        )
    detail = {name: value for name, value in given.items() if name != "url" and value is not None}
    if detail.pop("detail", "auto") != "auto" or detail:
        raise _bad(place, "image_url has url, and detail if it is 'auto'; leave out all else.")
    head = _DATA_URL.match(url)
    if head is None:
        raise _bad(
            place,
            f"the url begins {url[:30]!r}; images come in the request itself, as "
            f"data:image/TYPE;base64,... with TYPE one of {', '.join(FORMATS)}.",
        )
    kind = head[1].lower()
    if kind not in FORMATS:
        raise _bad(place, f"image/{kind} cannot be read; use one of {', '.join(FORMATS)}.")
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(place, f"the url is not base64 ({error}); encode the file's bytes.") from None
    return _pixels(content, kind, place, config)


def _pixels(content: bytes, kind: str, place: str, config: ImageConfig) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=(FORMATS[kind],)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _bad(
                    place,
                    f"the image has {image.width} x {image.height} pixels; at most "
                    f"{MAX_PIXELS:,} are read. Scale it down.",
                )
            image.load()
            found = ImageFitter(config, "resize").fit(image, place)
    except RequestError:
        raise
    # Pillow raises these, and its own below them, for files that are cut off or broken.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Its message names the buffer by its address in memory.
        problem = "not of that type" if isinstance(error, Image.UnidentifiedImageError) else error
        raise _bad(place, f"cannot be read as image/{kind} ({problem}); send the file.") from None
    if isinstance(found, BadRecord):
        raise _bad(place, found.problem)
    return found


def _bad(place: str, problem: str) -> RequestError:
    return RequestError(f"{place}: {problem}", param="messages", code="invalid_image")
