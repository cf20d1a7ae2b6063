"""Purposes that fold a number into the same key never share it."""

import jax
import numpy as np
import pytest

from megatransformer_jax import streams
from megatransformer_jax.streams import Purpose, generator_of

# By the key that they are folded into: the table of the module, but for what counts.
OF_ONE_KEY = {
    "run": ("VALIDATION", "ADMIN_PROFILE"),
    "weights": ("ADDED_WEIGHTS",),
    "objective": ("GATE", "PROBE", "MEDIA", "SUPERVISION"),
    "validated batch": ("VALIDATED_IMAGES", "VALIDATED_CLIPS"),
    "generated text": ("FIRST_STATE", "GENERATED_MEDIA"),
    "place of a token": ("DRAFT", "ACCEPT", "REPLACE"),
}
# Those of the data are words of NumPy's Philox.
OF_THE_DATA = {"SPLIT"}


def test_every_stream_has_a_key_that_it_is_folded_into():
    named = {name for name, value in vars(streams).items() if isinstance(value, int)}
    assert named == OF_THE_DATA | {name for names in OF_ONE_KEY.values() for name in names}


@pytest.mark.parametrize("names", OF_ONE_KEY.values(), ids=OF_ONE_KEY)
def test_streams_of_one_key_differ(names):
    numbers = [getattr(streams, name) for name in names]
    assert len(set(numbers)) == len(numbers)
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in numbers]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == len(keys)


def test_streams_of_an_objective_differ_from_the_keys_it_is_split_into():
    key = jax.random.key(0)
    taken = {jax.random.key_data(part).tobytes() for part in jax.random.split(key)}
    for name in OF_ONE_KEY["objective"]:
        part = jax.random.fold_in(key, getattr(streams, name))
        assert jax.random.key_data(part).tobytes() not in taken


def test_no_step_reaches_a_stream_of_the_run():
    # Samples fold the step into their own key; depth is drawn from the other half of the seed.
    assert min(getattr(streams, name) for name in OF_ONE_KEY["run"]) > 2**31


def test_purposes_draw_different_numbers_for_one_document():
    drawn = {generator_of(7, 3, purpose).integers(2**63) for purpose in Purpose}
    assert len(drawn) == len(Purpose)
    assert streams.SPLIT not in set(Purpose)


def test_documents_and_seeds_draw_different_numbers_and_the_same_again():
    def draw(seed: int, number: int) -> np.ndarray:
        return generator_of(seed, number, Purpose.SYNONYMS).integers(2**63, size=4)

    assert (draw(7, 3) == draw(7, 3)).all()
    assert not (draw(7, 3) == draw(7, 4)).any()
    assert not (draw(7, 3) == draw(8, 3)).any()
