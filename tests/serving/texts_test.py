import dataclasses
import types

import numpy as np
import pytest
from tiny_media_generator import CONFIG, IMAGE_PART, TOKENIZER

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.continuous.lanes import BatchShape
from megatransformer_jax.generation.endings import END_OF_TEXT, RUNNING
from megatransformer_jax.serving.requests import Finished, Job, NewToken, Scored
from megatransformer_jax.serving.texts import Text, prompt_length, to_row_text

LM = types.SimpleNamespace(config=CONFIG, tokenizer=TOKENIZER, trained_depth=3)
SHAPE = BatchShape(2, 64, 8, with_images=True)
OPENING = TOKENIZER.marker_id("<|IMAGE|>")
JOB = Job(
    (1, 5, OPENING, OPENING + 1, 6),
    GenerationConfig.of(max_new_tokens=8, max_media=0),
    media=(IMAGE_PART.pixels,),
)


def test_images_of_a_prompt_take_places_of_its_row() -> None:
    row_text = to_row_text(JOB, LM, SHAPE)
    assert row_text.images is JOB.media and prompt_length(JOB, LM) == 5 + 4
    text = Text(1, JOB, row_text, None, TOKENIZER, prompt_length(JOB, LM))
    assert (text.num_to_read, text.progress()["prompt_tokens"]) == (8, 9)
    full = dataclasses.replace(JOB.config, max_new_tokens=56)
    with pytest.raises(UserError, match="the prompt has 9 tokens"):
        to_row_text(dataclasses.replace(JOB, config=full), LM, SHAPE)


@pytest.mark.parametrize(
    ("changes", "shape", "problem"),
    [
        ({}, dataclasses.replace(SHAPE, with_images=False), "the batch is for text alone"),
        ({"scores_prompt": True}, SHAPE, "they cannot be scored"),
        ({"ids": (1, 5)}, SHAPE, "places for 0 images, and 1 are given"),
        ({"media": (np.zeros((2, 2, 1), np.float32),)}, SHAPE, "an image is"),
    ],
)
def test_images_that_do_not_fit_are_refused(changes, shape, problem) -> None:
    with pytest.raises(UserError, match=problem):
        to_row_text(dataclasses.replace(JOB, **changes), LM, shape)


def test_an_end_token_comes_with_its_depth() -> None:
    text = Text(1, JOB, to_row_text(JOB, LM, SHAPE), None, TOKENIZER, 9)
    (token,) = text.add(Scored(6, -1.0), 3, RUNNING)
    assert isinstance(token, NewToken) and token.depth == 3
    (end,) = text.add(Scored(2, -1.0), 2, END_OF_TEXT)
    assert isinstance(end, Finished) and (end.reason, end.end_depth) == ("end_of_text", 2)
