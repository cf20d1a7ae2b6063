"""Rows with images give what `Generator` gives, next to rows of text; wrong prompts are errors."""

import dataclasses

import numpy as np
import pytest
from driven_batcher import drive
from tiny_media_generator import CONFIG, IMAGE_PART, TOKENIZER, generator, parts

from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.sampling import DepthConfig
from megatransformer_jax.data.media.records import ImagePart, MediaFormats
from megatransformer_jax.generation.continuous.batcher import Batcher
from megatransformer_jax.generation.continuous.images import prompt_places
from megatransformer_jax.generation.continuous.lanes import BatchShape, RowText
from megatransformer_jax.generation.media_prompt import MediaPrompt, encode_media_prompt

# Chunks of 3, so that images of 4 places are cut.
SHAPE = BatchShape(2, 64, 8, chunk=3, criteria=("latent_diff",), with_images=True)
OTHER = ImagePart(np.random.default_rng(7).uniform(-1, 1, (4, 4, 1)).astype(np.float32))
PROMPTS = [
    MediaPrompt(("ab c", IMAGE_PART, " b")),
    MediaPrompt((OTHER,)),
    MediaPrompt(("ab c", OTHER, IMAGE_PART, "xa")),
    MediaPrompt(("ab cab b",)),
    MediaPrompt(("ab c", OTHER, " b")),
]
EXITS = DepthConfig(5, "latent_diff", 0.3)
OPTIONS = [{"strategy": "greedy"}, *({"seed": 3 + n, "depth": EXITS} for n in range(3))]
OPTIONS.append(OPTIONS[0])


def test_rows_give_what_the_generator_gives():
    """Five prompts over two rows, so that text follows an image in its row and the reverse."""
    texts, wanted = [], []
    for prompt, options in zip(PROMPTS, OPTIONS, strict=True):
        encoded = encode_media_prompt(prompt, TOKENIZER, MediaFormats.of_model(CONFIG))
        alone = generator({"max_media": 0}, max_new_tokens=8, **options)
        wanted.append(alone.generate([prompt])[0])
        end_ids = (TOKENIZER.eos_id,)
        texts.append(
            RowText.of_config(encoded.ids, alone.config, end_ids=end_ids, images=encoded.images)
        )
    batcher = Batcher(*parts(), TOKENIZER, SHAPE)
    for got, other in zip(drive(batcher, texts, arrival=1), wanted, strict=True):
        assert tuple(got.token_ids) == other.token_ids
        assert tuple(got.depths) == other.depths
        assert got.finish_reason == other.finish_reason
        assert got.score == pytest.approx(other.score, abs=1e-4)
    # Images are read: the same tokens are more or less likely behind another one.
    assert abs(wanted[0].score - wanted[4].score) > 0.1


OPENING, CLOSING = (TOKENIZER.marker_id(marker) for marker in ("<|IMAGE|>", "<|/IMAGE|>"))


def test_places_of_a_prompt():
    found = prompt_places(CONFIG, TOKENIZER, (1, 5, OPENING, CLOSING, 6), [IMAGE_PART.pixels])
    assert found.ids.tolist() == [1, 5, OPENING, 0, 0, 0, 0, CLOSING, 6]
    assert np.flatnonzero(found.is_image).tolist() == [3, 4, 5, 6]
    assert found.starts == (3,)


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ((1, 5), 1, "places for 0 images, and 1 are given"),
        ((1, OPENING, CLOSING), 2, "places for 1 images, and 2 are given"),
        ((1, OPENING), 1, "end with text"),
        ((1, TOKENIZER.marker_id("<|VOICE|>"), OPENING, CLOSING), 1, "text and images alone"),
    ],
)
def test_prompts_that_do_not_fit_their_images_are_errors(ids, count, message):
    with pytest.raises(UserError, match=message):
        prompt_places(CONFIG, TOKENIZER, ids, [IMAGE_PART.pixels] * count)


def test_what_cannot_have_images_says_so():
    ids, pixels = (1, OPENING, CLOSING), [IMAGE_PART.pixels]
    with pytest.raises(UserError, match=r"an image is \(2, 2, 1\), and the model's \(4, 4, 1\)"):
        prompt_places(CONFIG, TOKENIZER, ids, [pixels[0][:2, :2]])
    with pytest.raises(UserError, match="this model reads no images"):
        prompt_places(CONFIG, TOKENIZER.base, ids, pixels)
    batcher = Batcher(*parts(), TOKENIZER, dataclasses.replace(SHAPE, with_images=False))
    with pytest.raises(UserError, match="this batch is for text alone"):
        batcher.place(0, RowText(ids, 4, images=pixels))
