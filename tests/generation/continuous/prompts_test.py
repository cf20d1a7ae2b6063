"""Prompts of one call with settings of their own give what each gives alone."""

import dataclasses

import jax
import pytest
from tiny_generator import PIECES, assert_same, generator
from tiny_model import DEPTH, PLAIN, PROMPTS, TINY, make, tiny

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.generation.continuous.prompts import TextModel, prompt_texts
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder

RANDOM = tiny(recurrence={"state_init": "unit"})
OPTIONS = {"max_new_tokens": 8, "batch_size": 2}
# More than rows, so that texts follow each other.
EACH = [
    {"strategy": "greedy"},
    {"depth": 5, "exit_criterion": "latent_diff", "exit_threshold": 0.3, "seed": 3},
    {},
    {"depth": 6, "min_depth": 2, "exit_criterion": "kl", "exit_threshold": 0.2, "seed": 9},
    {"seed": 1, "stop": ("a", "b", "c"), "temperature": 0.5, "max_new_tokens": 20},
    {"seed": 7, "depth": 4, "warm_start": True, "no_repeat_ngram": 2, "frequency_penalty": 1.0},
]
MIXED = [*PROMPTS, *PROMPTS]


def alone(prompt, own):
    """What the prompt gives in a call of its own."""
    options = GenerationConfig.of(**OPTIONS | own)
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return generator(RANDOM, **fields).generate([prompt])[0]


def test_each_prompt_gives_what_it_gives_alone():
    found = generator(RANDOM, **OPTIONS).generate(MIXED, EACH)
    wanted = [alone(prompt, own) for prompt, own in zip(MIXED, EACH, strict=True)]
    # Without a seed of its own, the place in the call counts as always.
    wanted[2] = generator(RANDOM, **OPTIONS).generate(MIXED)[2]
    assert_same(found, wanted)
    assert {"stop", "length"} <= {text.finish_reason for text in found}
    assert {depth for text in found for depth in text.depths} > {3, 4}


def test_the_texts_of_a_call():
    texts = texts_of([{}, {"seed": 8, "depth": 9}], num_samples=2, seed=4, top_p=0.5)
    assert [text.ids for text in texts] == [tuple(PROMPTS[0])] * 2 + [tuple(PROMPTS[1])] * 2
    assert [(text.number, text.sample) for text in texts] == [(0, 0), (0, 1), (0, 0), (0, 1)]
    assert [text.config.seed for text in texts] == [4, 4, 8, 8]
    assert [text.config.depth.depth for text in texts] == [DEPTH, DEPTH, 9, 9]
    assert {text.config.sampling.top_p for text in texts} == {0.5}
    assert [text.number for text in texts_of([{"seed": 1}, {}])] == [0, 1]


def texts_of(each, prompts=PROMPTS[:2], config=TINY, **options):
    given = TextModel(*make(config), PIECES, DEPTH if config.is_recurrent else None, (2,))
    return prompt_texts(given, GenerationConfig.of(**options), prompts, each)


@pytest.mark.parametrize(
    ("each", "options", "message"),
    [
        ([{}], {}, "each has 1 sets of options for 2 prompts; give one dict per prompt"),
        ({"depth": 3}, {}, "each is a list with the options of every prompt, not {'depth'"),
        ([{}, 4], {}, r"each\[1\]: 4 is not a dict of options"),
        ([{}, {4: 4}], {}, r"each\[1\]: 4 is not the name of an option"),
        ([{"dept": 4}, {}], {}, r"each\[0\].dept: no such option; did you mean 'depth'"),
        ([{}, {"num_samples": 2}], {}, r"each\[1\].num_samples: is the same for all prompts"),
        ([{}, {"depth": 0}], {}, r"each\[1\].depth.depth: 0"),
        ([{}, {"strategy": "beam"}], {}, r"each\[1\].strategy: 'beam' decodes all prompts alike"),
        ([{}, {"top_p": 0.5}], {"strategy": "greedy"}, r"each\[1\].sampling.top_p: 0.5"),
        ([{}, {}], {"strategy": "speculative"}, r"each\[0\].strategy: 'speculative'"),
        ([{}, {}], {"banned_words": ("a",)}, r"each\[0\].sampling.banned_words: \('a',\) does not"),
        ([{}, {"no_repeat_ngram": 5}], {}, r"each\[1\].sampling.no_repeat_ngram: 5 .* at most 4"),
        ([{}, {"exit_criterion": "learned_gate"}], {}, r"each\[1\].depth.exit_criterion: 'learned"),
    ],
)
def test_settings_that_cannot_be_used_are_errors_that_name_the_prompt(each, options, message):
    with pytest.raises(UserError, match=message):
        texts_of(each, **options)


def test_a_plain_model_has_no_depth():
    with pytest.raises(ConfigError, match=r"each\[1\].depth.depth: .*no recurrent core"):
        texts_of([{}, {"depth": 4}], config=PLAIN)


def test_a_prompt_that_is_too_long_is_an_error():
    with pytest.raises(UserError, match="max_new_tokens=75 that is more than"):
        generator(TINY, **OPTIONS).generate(PROMPTS, [{}, {}, {"max_new_tokens": 75}])


def test_a_mesh_of_several_processes_is_an_error(monkeypatch):
    model, params = make(TINY)
    mesh = make_mesh(MeshConfig(data=8), jax.devices())
    given = TextModel(model.copy(sharder=Sharder(mesh)), params, PIECES, DEPTH, (2,))
    assert len(prompt_texts(given, GenerationConfig(), PROMPTS[:1], [{}])) == 1
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(UserError, match="each needs a mesh of one process"):
        prompt_texts(given, GenerationConfig(), PROMPTS[:1], [{}])
