"""POST /lens: what a generator did, iteration by iteration, and no other numbers."""

import asyncio
import dataclasses
import functools
import json

import jax
import jax.monitoring
import pytest
from tiny_model import PLAIN, Pieces, make, tiny

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.serving.lens import Lens
from megatransformer_jax.serving.served import ServedModel

CONFIG = ServingConfig(
    capacity=70, max_depth=12, cache_slots=8, chunk=4, criteria=("latent_diff", "kl", "cosine")
)
SERVED = ServedModel("tiny", Pieces(), Pieces.vocab_size, 70, 3)
# First states are drawn, so that seed, sample and the end of the prompt matter.
DRAWN = tiny(recurrence={"state_init": "like_init"})
PROMPT = [1, 12, 3, 3, 8, 17, 2]
# By which rules texts are made: one for which it does not matter how they are cut into passes, one
# whose iterations share slots, and one whose criterion needs logits.
RULES = {
    "latent_diff": {"depth": 8, "exit_criterion": "latent_diff", "exit_threshold": 0.3},
    "shared": {"depth": 12, "exit_criterion": "latent_diff", "exit_threshold": 0.1, "min_depth": 2},
    "kl": {"depth": 8, "exit_criterion": "kl", "exit_threshold": 0.003},
}


@pytest.fixture(scope="module")
def lens():
    model, params = make(DRAWN)
    # Bound to their device, as those of a model that is loaded.
    params = jax.device_put(params, jax.devices()[0])
    made = Lens(model, params, SERVED, CONFIG)
    made.compile()
    return made


@functools.cache
def completion(rule):
    """A text over several chunks, whose tokens leave at different depths."""
    model, params = make(DRAWN)
    cache = {"cache_slots": 8, "cache_prefill_chunk": 4}
    options = {**RULES[rule], **cache, "strategy": "greedy", "max_new_tokens": 62, "seed": 5}
    config = GenerationConfig.of(**options)
    # Ends nowhere, so that it is as long as asked for.
    return Generator(model, params, Pieces(), config, 3, end_ids=()).generate([PROMPT])[0]


def answer(lens, **body):
    request = lens.request(body)

    async def run(function):
        return function()

    found = asyncio.run(lens.answer(request, run))
    return json.loads(json.dumps(found, allow_nan=False))


def test_only_what_is_new_is_read_and_nothing_compiles(lens, monkeypatch):
    ids = [*PROMPT, *completion("latent_diff").token_ids]
    steps = []
    monkeypatch.setattr(lens, "step", lambda request: steps.append(1) or Lens.step(lens, request))
    compiled = []

    def listen(name, seconds, **_):
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        other = [*ids[:66], 5, *ids[67:]]
        for text, position, num_steps in ((ids, 68, 18), (ids, 3, 1), (ids, 67, 1), (other, 68, 2)):
            steps.clear()
            answer(lens, ids=text, position=position, depth=4, exit_criterion="kl", sample=2)
            assert len(steps) == num_steps
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize("rule", RULES)
def test_tokens_have_the_depths_that_the_generator_gave_them(lens, rule):
    made = completion(rule)
    ids, text = [*PROMPT, *made.token_ids], {**RULES[rule], "seed": 5, "prompt_tokens": len(PROMPT)}
    # Back and forth: the cache is cut, goes on, and begins again for another text.
    for place in (61, 3, 40, 0, 61):
        position = len(PROMPT) + place - 1
        found = answer(lens, ids=ids, position=position, **text)
        assert found["exit_depth"] == made.depths[place]
        assert found["next"]["id"] == made.token_ids[place]
        likeliest = [item["id"] for item in found["top"][found["exit_depth"] - 1]]
        # Of those that are text, as the model's other rows are never taken.
        assert next(i for i in likeliest if 2 <= i < Pieces.vocab_size) == found["next"]["id"]
        assert len(found["top"]) == len(found["values"]["kl"]) == text["depth"]
        answer(lens, ids=PROMPT)
    assert len(set(made.depths)) > 2
    other = answer(lens, ids=ids, position=65, **{**text, "seed": 6})
    assert other["values"] != answer(lens, ids=ids, position=65, **text)["values"]


def test_tokens_are_shown_as_text(lens):
    found = answer(lens, ids=[1, 9, 4], position=1)
    assert found["token"] == {"id": 9, "text": " "}
    assert found["next"]["text"] == "b"
    assert answer(lens, ids=[1])["token"]["text"] == "<1>"
    assert found["criteria"]["argmax_stability"]["settles"] == "at_least"
    assert found["depth"] == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "ids: is null; give a list"),
        ({"ids": []}, "ids: is empty; give"),
        ({"ids": [1, 32]}, "ids: 32 is not a token; ids are 0 to "),
        ({"ids": [1, "2"]}, "ids: has a text"),
        ({"ids": [1] * 71}, "ids: has 71 tokens; at most 70"),
        ({"ids": [1, 2], "position": 2}, "position: 2 is not allowed; it must be 0 to 1"),
        ({"ids": [1], "depth": 13}, "depth: 13 is not allowed; it must be 1 to 12"),
        ({"ids": [1], "depth": "8"}, "depth: '8'"),
        ({"ids": [1], "exit_criterion": "learned_gate"}, "needs a model with an exit gate"),
        ({"ids": [1], "exit_criterion": "minp_kl"}, "'minp_kl' is not among those"),
        ({"ids": [1], "exit_treshold": 1}, "did you mean 'exit_threshold'"),
        ({"ids": [1], "model": "other"}, "'other' is not served here"),
    ],
)
def test_what_cannot_be_looked_at_is_an_error(lens, body, message):
    with pytest.raises(UserError, match=message):
        lens.request(body)


def test_a_model_without_a_core_has_no_lens():
    plain = dataclasses.replace(SERVED, trained_depth=None)
    with pytest.raises(UserError, match="no recurrent core"):
        Lens(*make(PLAIN), plain, CONFIG)
