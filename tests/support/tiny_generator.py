"""Generators with the tiny model, for the tests of `Generator`."""

import dataclasses

import pytest
from tiny_model import DEPTH, TINY, Pieces, make

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.generation.generator import Generator

PIECES = Pieces()
# An end token that is never drawn. Not `()`: another number of end tokens compiles again.
NO_END = (30,)


def generator(config=TINY, tokenizer=PIECES, end_ids=None, trained_depth=DEPTH, **options):
    model, params = make(config)
    options = {"max_new_tokens": 8, **options}
    if not config.is_recurrent:
        trained_depth = None
    return Generator(model, params, tokenizer, GenerationConfig(**options), trained_depth, end_ids)


def assert_same(completions, wanted):
    """Scores apart by what shapes do to rounding."""
    for got, other in zip(completions, wanted, strict=True):
        assert got.score == pytest.approx(other.score, abs=1e-4)
        assert dataclasses.replace(got, score=0.0) == dataclasses.replace(other, score=0.0)
