"""Sampling without a cache: greedy equals step by step, temperature draws, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.checkpoints.huginn import load_huginn
from megatransformer_jax.config.model import AttentionConfig, MlpConfig, ModelConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.generation.sampling import sample_text, sample_tokens
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


class Letters:
    """One id per letter after three special ones."""

    vocab_size, pad_id, bos_id, eos_id = 29, 0, 1, 2

    def digest(self):
        return "letters"

    def encode(self, text):
        return [ord(letter) - ord("a") + 3 for letter in text]

    def decode(self, ids):
        return "".join(chr(i - 3 + ord("a")) for i in ids if i > 2)

    def piece_bytes(self, token):
        return self.decode([token]).encode()


@pytest.fixture(scope="module")
def model_and_params():
    config = ModelConfig(
        vocab_size=29,
        width=16,
        max_length=24,
        core_layers=1,
        attention=AttentionConfig(num_heads=2),
        mlp=MlpConfig(hidden_width=16),
        recurrence=RecurrenceConfig(state_init="zero"),
    )
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    return model, init_params(model, jax.random.key(3))


def sample(model_and_params, prompts, temperature=0.0, seed=0, max_new_tokens=6):
    model, params = model_and_params
    return sample_text(
        model,
        params,
        Letters(),
        prompts,
        num_steps=3,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        key=jax.random.key(seed),
    )


def test_greedy_equals_huginns_own_generation(huginn_fixture):
    config, params = load_huginn(huginn_fixture)
    expected = np.load(huginn_fixture / "expected.npz")
    wanted = expected["greedy_r8_zero_state"]
    prompts = expected["input_ids"].astype(np.int32)
    # The reference starts from the zero state; the model is told so by its config.
    recurrence = dataclasses.replace(config.recurrence, state_init="zero")
    config = dataclasses.replace(config, recurrence=recurrence)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    tokens = np.zeros(wanted.shape, np.int32)
    tokens[:, : prompts.shape[1]] = prompts
    filled = sample_tokens(
        model,
        jax.tree.map(jnp.asarray, params),
        jnp.asarray(tokens),
        jnp.full(2, prompts.shape[1], jnp.int32),
        jnp.int32(8),
        jnp.int32(wanted.shape[1] - prompts.shape[1]),
        jnp.float32(0.0),
        jax.random.key(0),
    )
    np.testing.assert_array_equal(filled, wanted)


def test_prompts_of_unequal_length_equal_each_alone(model_and_params):
    together = sample(model_and_params, ["abc", "hello", "z"])
    assert together == [sample(model_and_params, [p])[0] for p in ("abc", "hello", "z")]
    for prompt, text in zip(["abc", "hello", "z"], together, strict=True):
        assert text.startswith(prompt)


def test_draws_follow_the_key(model_and_params):
    texts = [sample(model_and_params, ["abc"], 1.0, seed)[0] for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts[1:])) > 1


def test_draws_have_the_models_probabilities(model_and_params):
    """Chi-square of one sampled token over many rows against the softmax at temperature 0.7."""
    model, params = model_and_params
    rows, temperature = 4096, 0.7
    tokens = jnp.zeros((rows, 4), jnp.int32).at[:, :3].set(jnp.array([1, 5, 6]))
    lengths = jnp.full(rows, 3, jnp.int32)
    filled = sample_tokens(
        model,
        params,
        tokens,
        lengths,
        jnp.int32(3),
        jnp.int32(1),
        jnp.float32(temperature),
        jax.random.key(0),
    )
    logits = model.apply({"params": params}, tokens[:1], num_steps=3).logits[0, 2]
    expected = rows * np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    observed = np.bincount(np.asarray(filled[:, 3]), minlength=29)
    # 28 degrees of freedom: 99.9% of true samples stay below 56.9.
    assert np.sum((observed - expected) ** 2 / expected) < 56.9


def test_text_ends_at_the_end_of_text_token(model_and_params):
    """Hot sampling draws that token sooner or later; nothing after it may show."""
    texts = [sample(model_and_params, ["abc"], 5.0, seed, 12)[0] for seed in range(12)]
    assert min(map(len, texts)) < len("abc") + 12
    assert all(text.startswith("abc") for text in texts)


def test_ids_beyond_the_tokenizer_and_padding_are_never_drawn(model_and_params):
    """The model has rows to spare; hot sampling would draw them in nearly every text."""

    class FewLetters(Letters):
        vocab_size = 8

        def decode(self, ids):
            assert all(0 < i < self.vocab_size for i in ids)
            return super().decode(ids)

    model, params = model_and_params
    texts = sample_text(
        model,
        params,
        FewLetters(),
        ["abc"] * 4,
        num_steps=2,
        max_new_tokens=12,
        temperature=10.0,
        key=jax.random.key(0),
    )
    assert set("".join(texts)) <= set("abcde")


def test_too_long_and_no_prompts_are_user_errors(model_and_params):
    with pytest.raises(UserError, match=r"model\.max_length=24"):
        sample(model_and_params, ["a" * 20])
    with pytest.raises(UserError, match="no prompt"):
        sample(model_and_params, [])
