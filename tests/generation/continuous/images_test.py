"""Where images of a prompt stand; wrong prompts are errors. `serving/images_test.py` reads them."""

import numpy as np
import pytest
from tiny_media_generator import CONFIG, IMAGE_PART, TOKENIZER, parts

from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.continuous.batcher import Batcher
from megatransformer_jax.generation.continuous.images import prompt_places
from megatransformer_jax.generation.continuous.lanes import BatchShape, RowText

SHAPE = BatchShape(2, 64, 8)
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
    batcher = Batcher(*parts(), TOKENIZER, SHAPE)
    with pytest.raises(UserError, match="this batch is for text alone"):
        batcher.place(0, RowText(ids, 4, images=pixels))
