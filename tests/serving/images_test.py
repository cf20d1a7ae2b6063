"""Images of requests are the model's, and what is not one is refused in OpenAI's shape."""

import base64
import dataclasses
import io
import re
import types

import numpy as np
import pytest
import tiny_media_generator as tiny_media
from engine_readers import Reader
from PIL import Image
from served_bytes import chat, refusal, with_tokenizer

from megatransformer_jax.config.generation import MediaGenerationConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.data.media.records import ImagePart, MediaFormats
from megatransformer_jax.generation.media_prompt import MediaPrompt
from megatransformer_jax.serving import images
from megatransformer_jax.serving.engine import Engine
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


# ------------------------------------------------------------------------------
# Chats with images.

TOKENIZER = tiny_media.TOKENIZER
MODEL = with_tokenizer(
    TOKENIZER,
    makes_media=True,
    formats=MediaFormats.of_model(tiny_media.CONFIG),
    trained_depth=3,
    capacity=64,
)
SETTINGS = ServingConfig(
    name="tiny",
    rows=2,
    capacity=64,
    chunk=3,  # So that images of 4 places are cut.
    criteria=("latent_diff",),
    max_depth=8,
    cache_slots=8,
)
GREY = [np.random.default_rng(seed).integers(0, 256, (4, 4), np.uint8) for seed in range(2)]


def shown(number: int) -> dict:
    return part(encoded(Image.fromarray(GREY[number])))


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def asked(*parts, model=MODEL, **fields):
    """The job of a chat."""
    messages = [{"role": "user", "content": list(parts)}]
    (job,) = chat(model, SETTINGS, messages=messages, max_tokens=8, **fields).jobs
    return job


def test_answers_are_those_of_the_generator():
    """Over two rows, so that text follows an image in its row and the reverse."""
    greedy = {"temperature": 0, "ignore_eos": True}
    drawn = {"depth": 5, "exit_criterion": "latent_diff", "exit_threshold": 0.3}
    asked_for = [
        (("ab c", 0, " b"), greedy),
        ((1,), drawn),
        (("ab c", 1, 0, "xa"), {**drawn, "seed": 9}),
        (("ab c", 1, " b"), greedy),
    ]
    model, params = tiny_media.parts()
    lm = types.SimpleNamespace(
        config=tiny_media.CONFIG, tokenizer=TOKENIZER, trained_depth=3, module=model, weights=params
    )
    jobs, wanted = [], []
    for parts, fields in asked_for:
        given = [said(one) if isinstance(one, str) else shown(one) for one in parts]
        jobs.append(asked(*given, **fields))
        pixels = [GREY[one][..., None] / np.float32(127.5) - 1 for one in parts if one in (0, 1)]
        media = iter([ImagePart(one) for one in pixels])
        prompt = MediaPrompt(tuple(one if isinstance(one, str) else next(media) for one in parts))
        config = jobs[-1].config
        assert config.media == MediaGenerationConfig(max_media=0)
        end_ids = () if fields is greedy else None
        alone = tiny_media.Generator(model, params, TOKENIZER, config, 3, end_ids)
        wanted.append(alone.generate([prompt])[0])
    config = jobs[1].config
    jobs.append(dataclasses.replace(jobs[1], ids=(1, 5), media=()))
    wanted.append(tiny_media.Generator(model, params, TOKENIZER, config, 3).generate([[1, 5]])[0])
    readers = [Reader() for _ in jobs]
    with Engine(lm, SETTINGS) as engine:
        for job, reader in zip(jobs, readers, strict=True):
            engine.submit([job], reader)
        for reader in readers:
            reader.wait()
        assert re.search(rb"compilations_total\{.*\} 0.0", engine.metrics.text())
    for reader, other in zip(readers, wanted, strict=True):
        assert tuple(reader.tokens()[: len(other.token_ids)]) == other.token_ids
        assert (reader.text(), reader.reason()) == (other.text, other.finish_reason)
    # Images are read: behind another one the same tokens are more or less likely.
    assert wanted[0].score != pytest.approx(wanted[3].score, abs=0.01)


def test_a_chat_with_an_image_is_its_parts():
    opening, closing = (TOKENIZER.marker_id(name) for name in ("<|IMAGE|>", "<|/IMAGE|>"))
    job = asked(said("ab"), shown(0))
    assert job.ids == (TOKENIZER.bos_id, *TOKENIZER.encode("ab"), opening, closing)
    np.testing.assert_allclose(job.media[0][..., 0], GREY[0] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([{"role": "user", "content": [shown(0)]}] * 2, "no_chat_template"),
        ([{"role": "system", "content": [shown(0)]}], "no_chat_template"),
        (
            [{"role": "user", "content": [shown(0), {"type": "input_audio"}]}],
            "images_not_supported",
        ),
        ([{"role": "user", "content": [part("https://a.b/c.png")]}], "invalid_image"),
        ([{"role": "user", "content": [shown(0)] * 13}], "context_length_exceeded"),
    ],
)
def test_chats_that_the_model_cannot_read(messages, code):
    assert refusal(chat, MODEL, SETTINGS, messages=messages) == ("messages", code)
