"""Texts that a run shows of its model."""

import jax
import numpy as np
import pytest

from megatransformer_jax.config.build import build
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.sampling import DepthConfig
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.runs.tasks.text import prompt_sampler
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


class Letters:
    """Eight ids: three special ones and a to e. It refuses padding, the end and unknown ids."""

    vocab_size, pad_id, bos_id, eos_id = 8, 0, 1, 2

    def digest(self):
        return "letters"

    def encode(self, text):
        return [ord(letter) - ord("a") + 3 for letter in text]

    def decode(self, ids):
        assert all(0 < i < self.vocab_size and i != self.eos_id for i in ids)
        return "".join(chr(i - 3 + ord("a")) for i in ids if i > 2)

    def piece_bytes(self, token):
        return chr(token - 3 + ord("a")).encode() if token > 2 else b""


PROMPTS = ("abc", "", "e", "dd")
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def parts(small_run):
    """(config, model, params); the model has rows for 264 ids."""
    changes = {"model": {"recurrence": {"state_init": "zero"}}}
    config = build(small_run("unused", changes))
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    # Fresh models score all tokens alike; noise tells them apart.
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32),
        init_params(model, jax.random.key(0)),
    )
    return config, model, noisy


@pytest.fixture(scope="module")
def texts_of(parts, small_run):
    def texts(step, **samples):
        samples = {"prompts": PROMPTS, "max_new_tokens": NEW_TOKENS, "every_steps": 4} | samples
        config = build(small_run("unused", {"samples": samples}))
        return prompt_sampler(config, parts[1], Letters())(parts[2], step)

    return texts


def test_texts_go_on_from_their_prompts_with_text_only(texts_of):
    """Nearly uniform draws from 264 ids would often be padding, no letter, or behind the end."""
    texts = texts_of(4, temperature=50.0)
    assert list(texts) == [f"prompt_{index}" for index in range(len(PROMPTS))]
    for prompt, text in zip(PROMPTS, texts.values(), strict=True):
        assert text.startswith(prompt) and set(text) <= set("abcde")
    more = [texts_of(step, temperature=50.0) for step in (8, 12)]
    lengths = [
        len(text) - len(prompt)
        for shown in (texts, *more)
        for prompt, text in zip(PROMPTS, shown.values(), strict=True)
    ]
    assert max(lengths) > 1
    assert min(lengths) < NEW_TOKENS, "the end of text comes sooner in some"


def test_draws_follow_the_step(texts_of):
    assert texts_of(4, temperature=1.0) == texts_of(4, temperature=1.0)
    assert texts_of(4, temperature=1.0) != texts_of(8, temperature=1.0)


@pytest.mark.parametrize(("own", "depth"), [(None, 2), (5, 5)])
def test_without_temperature_the_likeliest_text_at_the_samples_depth(texts_of, parts, own, depth):
    config, model, params = parts
    generation = GenerationConfig(
        strategy="greedy", max_new_tokens=NEW_TOKENS, depth=DepthConfig(depth=depth)
    )
    mean_steps = config.model.recurrence.mean_steps
    generator = Generator(model, params, Letters(), generation, mean_steps)
    wanted = [text.prompt + text.text for text in generator.generate(["abc", "dd"])]
    ours = texts_of(4, temperature=0.0, depth=own)
    assert [ours["prompt_0"], ours["prompt_3"]] == wanted
    assert ours == texts_of(8, temperature=0.0, depth=own)
    other_depth = texts_of(4, temperature=0.0, depth=7 - depth)
    assert ours != other_depth
