"""Images of requests are the model's, and what is not one is refused in OpenAI's shape."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.serving import images
from megatransformer_jax.serving.errors import RequestError
from megatransformer_jax.serving.images import image_of_part

COLOUR = ImageConfig(enabled=True, height=4, width=8, channels=3, patch_size=2)
PLACE = "messages[0].content[1]"


def encoded(image: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def part(url, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def test_an_image_of_the_right_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3)).astype(np.uint8)
    found = image_of_part(part(encoded(Image.fromarray(pixels)), detail="auto"), PLACE, COLOUR)
    assert found.dtype == np.float32
    np.testing.assert_allclose((found + 1) * 127.5, pixels, atol=1e-4)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_other_sizes_and_colours_become_the_models(kind):
    """Grey, tall, and white at the bottom, which is cut off."""
    image = Image.new("L", (16, 40), 51)
    image.paste(255, (0, 30, 16, 40))
    found = image_of_part(part(encoded(image, kind)), PLACE, COLOUR)
    assert found.shape == (4, 8, 3)
    np.testing.assert_allclose(found, 51 / 127.5 - 1, atol=0.02)


PNG = encoded(Image.new("RGB", (8, 4)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "image_url", "image_url": PNG}, "is not an image; give"),
        ({"type": "image_url"}, "is not an image; give"),
        ({**part(PNG), "text": "a"}, "is not an image; give"),
        (part(4), "is not an image; give"),
        (part(PNG, detail="high"), "leave out all else"),
        (part("https://example.org/a.png"), "begins 'https://example.org/a.png'; images come in"),
        (part("file:///etc/passwd"), "images come in the request itself"),
        (part("data:text/plain;base64,AAAA"), "images come in the request itself"),
        (part("data:image/svg;base64,AAAA"), "image/svg cannot be read; use one of png, jpeg"),
        (part("data:image/png;base64,A"), "the url is not base64"),
        (part("data:image/png;base64,AAAA"), r"cannot be read as image/png \(not of that type\)"),
        (part(PNG.replace("/png", "/jpeg")), r"cannot be read as image/jpeg \(not of that type\)"),
        (part(PNG[:-40]), "cannot be read as image/png"),
    ],
)
def test_what_is_not_an_image_is_refused(given, message):
    with pytest.raises(RequestError, match=message) as caught:
        image_of_part(given, PLACE, COLOUR)
    assert str(caught.value).startswith(PLACE)
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")


def test_an_image_too_large_to_decode_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 31)
    with pytest.raises(RequestError, match="the image has 8 x 4 pixels; at most 31 are read"):
        image_of_part(part(PNG), PLACE, COLOUR)
