"""The chain of a configuration: which processors, in which order, and which errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.generation import BeamConfig, GenerationConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.sampling import SamplingConfig
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.generation.history import History, history_of_prompts
from megatransformer_jax.generation.processors.build import build_chain
from megatransformer_jax.generation.processors.processor import (
    Chain,
    allowed_tokens,
    apply_chain,
    init_chain,
)

BYTES = BytesTokenizer()
ALL = SamplingConfig(
    temperature=0.7,
    top_k=5,
    top_p=0.8,
    min_p=0.1,
    typical_p=0.9,
    repetition_penalty=1.2,
    presence_penalty=0.1,
    frequency_penalty=0.2,
    no_repeat_ngram=3,
    banned_words=("bad",),
    forced_words=("good",),
)


def names(config: GenerationConfig) -> list[str]:
    chain = build_chain(config, BYTES, 270)
    return [type(processor).__name__ for processor in chain]


@jax.jit
def process(chain: Chain, history: History) -> jax.Array:
    return apply_chain(chain, init_chain(chain, history), history, jnp.zeros((1, 270)))


def test_the_order():
    assert names(GenerationConfig(sampling=ALL)) == [
        "RepetitionPenalty",
        "CountPenalty",
        "NoRepeatNgram",
        "BannedTexts",
        "AllowedTokens",
        "ForcedWords",
        "Temperature",
        "TopK",
        "TopP",
        "MinP",
        "Typical",
    ]


def test_what_is_off_is_left_out():
    assert names(GenerationConfig()) == ["AllowedTokens", "Temperature"]
    assert names(GenerationConfig(strategy="greedy")) == ["AllowedTokens"]
    assert names(GenerationConfig(strategy="beam", beam=BeamConfig(num_beams=2))) == [
        "AllowedTokens"
    ]
    for penalty in ("presence_penalty", "frequency_penalty"):
        config = GenerationConfig(sampling=SamplingConfig(**{penalty: 1.0}))
        assert names(config) == ["CountPenalty", "AllowedTokens", "Temperature"]


def test_numbers_reach_their_processors():
    chain = build_chain(GenerationConfig(sampling=ALL), BYTES, 270)
    by_name = {type(processor).__name__: processor for processor in chain}
    assert by_name["RepetitionPenalty"].penalty == jnp.float32(1.2)
    assert by_name["CountPenalty"].presence == jnp.float32(0.1)
    assert by_name["CountPenalty"].frequency == jnp.float32(0.2)
    assert by_name["NoRepeatNgram"].size == 3
    assert by_name["Temperature"].temperature == jnp.float32(0.7)
    assert by_name["TopK"].top_k == 5
    assert by_name["TopP"].top_p == jnp.float32(0.8)
    assert by_name["MinP"].min_p == jnp.float32(0.1)
    assert by_name["Typical"].mass == jnp.float32(0.9)
    assert by_name["ForcedWords"].max_new_tokens == 128


def test_words_are_banned_and_forced():
    sampling = SamplingConfig(banned_words=("ab",), forced_words=("go",))
    config = GenerationConfig(sampling=sampling, max_new_tokens=3)
    chain = build_chain(config, BYTES, 270)
    scores = []
    for new in ("", " ", " a"):
        history = history_of_prompts([[1, *BYTES.encode("xa" + new)]], 20, BYTES.pad_id)
        history = history.replace(prompt_lengths=jnp.array([3]))
        scores.append(process(chain, history)[0])
    (blank,) = BYTES.encode(" ")
    (g,) = BYTES.encode("g")
    assert np.flatnonzero(np.isfinite(scores[0])).tolist() == [blank]
    assert np.flatnonzero(np.isfinite(scores[1])).tolist() == [g]

    free = build_chain(GenerationConfig(sampling=sampling), BYTES, 270)
    history = history_of_prompts([[1, *BYTES.encode("xa")]], 20, BYTES.pad_id)
    allowed = np.isfinite(
        apply_chain(free, init_chain(free, history), history, jnp.zeros((1, 270)))
    )
    (b,) = BYTES.encode("b")
    expected = set(range(1, BYTES.vocab_size)) - {b, BYTES.eos_id}
    assert set(np.flatnonzero(allowed[0]).tolist()) == expected


def test_a_word_with_a_blank_is_written_as_it_is():
    sampling = SamplingConfig(forced_words=(" go", "go"), banned_words=(" g o",))
    (*_, forced, _) = build_chain(GenerationConfig(sampling=sampling), BYTES, 270)
    spellings = [
        [[int(token) for token in spelling if token >= 0] for spelling in word]
        for word in np.asarray(forced.spellings)
    ]
    assert spellings == [
        [BYTES.encode(" go"), []],
        [BYTES.encode(" go"), BYTES.encode("go")],
    ]


def test_a_spelling_that_is_banned_is_not_written():
    sampling = SamplingConfig(forced_words=("go",), banned_words=(" g",))
    (*_, forced, _) = build_chain(GenerationConfig(sampling=sampling), BYTES, 270)
    assert forced.spellings.tolist() == [[BYTES.encode("go")]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"sampling": SamplingConfig(forced_words=("words",)), "max_new_tokens": 5},
            r"sampling.forced_words: \('words',\) take 6 tokens, more than max_new_tokens=5; raise",
        ),
        (
            {"sampling": SamplingConfig(forced_words=("a",)), "stop": ("\n",)},
            r"sampling.forced_words: .* together with stop=\('\\n',\), which may end the text",
        ),
        (
            {"sampling": SamplingConfig(banned_words=("a\ufffd",))},
            r"sampling.banned_words: .* cannot be looked for",
        ),
    ],
)
def test_words_that_do_not_work_are_errors(config: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build_chain(GenerationConfig(**config), BYTES, 270)


def test_a_tokenizer_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="vocabulary of 100 and the tokenizer one of 259"):
        allowed_tokens(BYTES, 100)


def test_an_end_token_that_pads_stays_allowed():
    is_allowed = allowed_tokens(BytesTokenizer(pad_id=2), 259).is_allowed
    assert is_allowed.all()
    assert not allowed_tokens(BYTES, 259).is_allowed[BYTES.pad_id]
