"""Codas: what all must do, and which one the options choose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_media_model import CONFIG, tiny_media_model

from megatransformer_jax.models.cost.flops import media_flops
from megatransformer_jax.models.media.coda import Coda, QueryCoda, WindowCoda, build_coda
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

COUNT, LENGTH, QUERIES = 3, 4, 2
LATENTS = jax.random.normal(jax.random.key(0), (COUNT, LENGTH, CONFIG.width))
# A whole window, a part of one, and an unused slot.
EXISTS = jnp.asarray([[True] * 4, [False, False, True, True], [False] * 4])


def with_queries(count):
    return dataclasses.replace(
        CONFIG, image=dataclasses.replace(CONFIG.image, coda_queries=count, context_length=16)
    )


@pytest.fixture(scope="module", params=[None, QUERIES], ids=["window", "queries"])
def case(request):
    config = with_queries(request.param)
    coda = build_coda(config, config.image, DTypePolicy(), Sharder(), "cpu")
    variables = coda.init(jax.random.key(1), LATENTS, EXISTS, True)
    run = jax.jit(lambda latents: coda.apply(variables, latents, EXISTS, True))
    return request.param, coda, run


def test_the_option_chooses(case):
    queries, coda, run = case
    assert isinstance(coda, Coda)
    assert isinstance(coda, WindowCoda if queries is None else QueryCoda)
    condition = run(LATENTS)
    assert condition.context.shape == (COUNT, queries or LENGTH, CONFIG.width)
    wanted = EXISTS if queries is None else jnp.broadcast_to(EXISTS.any(1)[:, None], (COUNT, 2))
    np.testing.assert_array_equal(condition.is_context, wanted)


def test_places_that_do_not_exist_change_nothing_and_those_that_do_change_it(case):
    _, _, run = case
    condition = run(LATENTS)
    hidden = run(jnp.where(EXISTS[..., None], LATENTS, 1e3))
    np.testing.assert_allclose(hidden.context, condition.context, atol=1e-6)
    assert not np.any(condition.context[~condition.is_context])
    for row, place in ((0, 0), (0, 3), (1, 2)):
        moved = run(LATENTS.at[row, place].add(1.0))
        changed = np.abs(moved.context - condition.context).max(axis=(1, 2))
        assert changed[row] > 1e-3
        assert np.delete(changed, row).max() == 0


def test_queries_make_the_decoder_cheaper_and_the_coda_more_expensive():
    window, queries = (
        media_flops(tiny_media_model(with_queries(count)))["image"] for count in (None, QUERIES)
    )
    assert queries.decoder < window.decoder
    assert queries.coda > window.coda
