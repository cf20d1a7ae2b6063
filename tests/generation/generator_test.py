"""Prompts to texts: what users get, streamed or at once, and what they are told."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tiny_generator import NO_END, PIECES, assert_same, generator
from tiny_model import (
    DEPTH,
    PLAIN,
    PROMPTS,
    TINY,
    Pieces,
    all_logits,
    make,
    recomputed_greedy,
    recomputed_score,
    tiny,
)

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.sampling import CacheConfig, DepthConfig, SamplingConfig
from megatransformer_jax.data.hf_tokenizer import HuggingFaceTokenizer
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.generation.generator import Generator

BYTES = BytesTokenizer()
RANDOM = tiny(recurrence={"state_init": "unit"})
BYTES_MODEL = dataclasses.replace(PLAIN, vocab_size=264)
# What a completion may hold: padding and the rows behind the tokenizer's are not text.
TEXT_IDS = range(1, PIECES.vocab_size)


@pytest.mark.parametrize("config", [TINY, PLAIN], ids=["recurrent", "plain"])
def test_greedy_completions(config):
    """Ids, text, steps and score of unequal prompts, from texts and from ids."""
    prompts = ["ab c", "\u20aca b c xab", PROMPTS[2]]
    ids = [[1, *PIECES.encode(text)] for text in prompts[:2]] + [PROMPTS[2]]
    completions = generator(config, strategy="greedy").generate(prompts)
    for prompt, tokens, completion in zip(prompts, ids, completions, strict=True):
        wanted = recomputed_greedy(*make(config), tokens, 8, allowed=TEXT_IDS)
        is_ended = 2 in wanted
        wanted = wanted[: wanted.index(2) + 1] if is_ended else wanted
        score = recomputed_score(*make(config), tokens, wanted)
        wanted = wanted[: len(wanted) - is_ended]
        assert completion.token_ids == tuple(wanted)
        assert completion.prompt == (prompt if isinstance(prompt, str) else None)
        assert completion.text == PIECES.decode(wanted)
        assert completion.depths == (DEPTH if config.is_recurrent else 0,) * len(wanted)
        assert completion.score == pytest.approx(score, abs=1e-4)
        assert completion.finish_reason == ("end_of_text" if is_ended else "length")


def test_first_tokens_are_drawn_as_the_chain_says():
    """Chi-square against the softmax of the model's scores at temperature 0.8 and top 7."""
    prompt, observed = PROMPTS[0], np.zeros(32)
    for seed in range(3):
        texts = generator(
            PLAIN,
            max_new_tokens=1,
            num_samples=600,
            seed=seed,
            end_ids=NO_END,
            sampling=SamplingConfig(temperature=0.8, top_k=7),
        ).generate([prompt])
        np.add.at(observed, [text.token_ids[0] for text in texts], 1)
    scores = all_logits(*make(PLAIN), prompt)[-1].astype(np.float64) / 0.8
    scores[[i for i in range(32) if i not in TEXT_IDS]] = -np.inf
    scores[np.argsort(scores)[:-7]] = -np.inf
    expected = 1800 * np.exp(scores) / np.exp(scores).sum()
    kept = expected > 0
    assert observed[~kept].sum() == 0
    # 6 degrees of freedom: 99.9% of true samples stay below 22.5.
    assert np.sum((observed - expected)[kept] ** 2 / expected[kept]) < 22.5


def test_a_text_depends_on_its_prompt_place_and_seed_alone():
    """Not on the other prompts, nor on how many are decoded at once."""
    wanted = generator(RANDOM, seed=3).generate(PROMPTS)
    assert len({text.token_ids for text in wanted}) == 3
    others = [PROMPTS[0], [1, 3, 3, 5, 9], PROMPTS[2]]
    got = generator(RANDOM, seed=3).generate(others)
    assert_same([got[0], got[2]], [wanted[0], wanted[2]])
    # A full batch, and one that is filled up.
    assert_same(generator(RANDOM, seed=3, batch_size=2).generate(PROMPTS), wanted)
    # The seed counts, and so does the place.
    assert generator(RANDOM, seed=4).generate(PROMPTS)[0].token_ids != wanted[0].token_ids
    same = generator(RANDOM, seed=3).generate([PROMPTS[0]] * 3)
    assert same[0].token_ids == wanted[0].token_ids
    assert len({text.token_ids for text in same}) == 3


def test_samples_of_one_prompt_stand_together_and_the_first_is_the_single_one():
    single = generator(RANDOM, seed=3).generate(PROMPTS)
    several = generator(RANDOM, seed=3, num_samples=2).generate(PROMPTS)
    assert_same(several[::2], single)
    assert len({text.token_ids for text in several}) == 6
    # One prompt at a time, as three texts have no room for two of them.
    assert_same(generator(RANDOM, seed=3, num_samples=2, batch_size=3).generate(PROMPTS), several)


STREAMS = {
    "greedy": (TINY, PIECES, {"strategy": "greedy"}),
    "sample": (TINY, PIECES, {}),
    "stop": (TINY, PIECES, {"stop": ("ab", "c x", "\u20ac")}),
    "bytes": (BYTES_MODEL, BYTES, {"stop": ("\u00e9", "q1")}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_gives_the_tokens_and_the_text_of_generate(name):
    config, tokenizer, options = STREAMS[name]
    reasons, texts = set(), []
    # The last prompt ends within a character.
    prompts = [[1, *tokenizer.encode("ab")], [1, 7], [1, tokenizer.encode("\u20ac")[0]]]
    for seed in range(1 if name == "greedy" else 12):
        given = generator(config, tokenizer, seed=seed, max_new_tokens=14, **options)
        for prompt in prompts:
            wanted = given.generate([prompt])[0]
            tokens = list(given.stream(prompt))
            assert tuple(token.token_id for token in tokens) == wanted.token_ids
            assert tuple(token.depth for token in tokens) == wanted.depths
            assert "".join(token.text for token in tokens) == wanted.text
            assert not any(stop in wanted.text for stop in options.get("stop", ()))
            is_ended = wanted.finish_reason == "end_of_text"
            new = [*wanted.token_ids, *[tokenizer.eos_id] * is_ended]
            score = recomputed_score(*make(config), prompt, new)
            assert wanted.score == pytest.approx(score, abs=1e-3)
            reasons.add(wanted.finish_reason)
            texts.append(wanted.text)
    if name == "sample":
        assert reasons == {"end_of_text", "length"}
    if name == "stop":
        assert reasons >= {"end_of_text", "stop"}
    if name == "bytes":
        assert any("\ufffd" in text for text in texts)


def test_a_stop_ends_the_text_where_it_begins():
    """Across tokens, and with what else is in the token that completes it."""
    free = generator(seed=5, max_new_tokens=30, end_ids=NO_END).generate([[1, 3]])[0]
    text = free.text
    start = next(i for i in range(8, len(text)) if "\ufffd" not in text[i : i + 3])
    stop = text[start : start + 3]
    given = generator(seed=5, max_new_tokens=30, end_ids=NO_END, stop=(stop, "never"))
    stopped = given.generate([[1, 3]])[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]
    size = len(stopped.token_ids)
    assert stopped.token_ids == free.token_ids[:size]
    assert stop in PIECES.decode(stopped.token_ids)
    assert stop not in PIECES.decode(stopped.token_ids[:-1])


def test_end_tokens_are_no_part_of_the_text():
    first = generator(strategy="greedy", end_ids=NO_END).generate([PROMPTS[0]])[0]
    assert first.finish_reason == "length" and len(first.token_ids) == 8
    given = generator(strategy="greedy", end_ids=first.token_ids[:1])
    empty = given.generate([PROMPTS[0]])[0]
    assert (empty.text, empty.token_ids, empty.depths) == ("", (), ())
    assert empty.finish_reason == "end_of_text"
    score = recomputed_score(*make(TINY), PROMPTS[0], first.token_ids[:1])
    assert empty.score == pytest.approx(score, abs=1e-4)
    assert list(given.stream(PROMPTS[0])) == []


def test_one_new_token():
    wanted = generator(strategy="greedy", end_ids=NO_END).generate([PROMPTS[0]])[0]
    given = generator(strategy="greedy", end_ids=NO_END, max_new_tokens=1)
    one = given.generate([PROMPTS[0]])[0]
    assert one.token_ids == wanted.token_ids[:1] and one.finish_reason == "length"
    tokens = list(given.stream(PROMPTS[0]))
    assert [(token.token_id, token.depth) for token in tokens] == [(one.token_ids[0], DEPTH)]
    assert tokens[0].text == one.text


def test_a_text_ends_when_every_token_is_banned():
    """No token may occur twice, and the prompt has most of them already."""
    prompt = [1, *range(3, 24)]
    given = generator(PLAIN, end_ids=NO_END, sampling=SamplingConfig(no_repeat_ngram=1), seed=1)
    completion = given.generate([prompt])[0]
    assert completion.finish_reason == "exhausted"
    assert sorted(completion.token_ids) == [2, 24, 25]
    score = recomputed_score(*make(PLAIN), prompt, completion.token_ids)
    assert completion.score == pytest.approx(score, abs=1e-4)
    tokens = list(given.stream(prompt))
    assert tuple(token.token_id for token in tokens) == completion.token_ids
    assert "".join(token.text for token in tokens) == completion.text
    nothing = given.generate([list(range(1, 26))])[0]
    assert (nothing.token_ids, nothing.score) == ((), 0.0)
    assert nothing.finish_reason == "exhausted"
    assert list(given.stream(list(range(1, 26)))) == []


@pytest.mark.parametrize(
    "changed",
    [{"depth": DepthConfig(warm_start=True)}, {"cache": CacheConfig(slots=1)}],
    ids=["warm_start", "slots"],
)
def test_options_of_the_core_reach_it(changed):
    """What they do there is tested with the loop and the cache."""
    plain = generator(strategy="greedy", end_ids=NO_END).generate(PROMPTS)
    got = generator(strategy="greedy", end_ids=NO_END, **changed).generate(PROMPTS)
    apart = np.array([text.score for text in got]) - [text.score for text in plain]
    assert np.abs(apart).max() > 1e-2


def test_a_cache_that_just_suffices_and_one_that_does_not():
    prompt = [1, *[9, 4, 20] * 17]
    exact = CacheConfig(capacity=64)
    given = generator(PLAIN, strategy="greedy", max_new_tokens=12, cache=exact, end_ids=NO_END)
    wanted = recomputed_greedy(*make(PLAIN), prompt, 12, allowed=TEXT_IDS)
    assert given.generate([prompt])[0].token_ids == tuple(wanted)
    with pytest.raises(ConfigError, match=r"cache\.capacity.*63.*52.*raise it to 64"):
        generator(max_new_tokens=12, cache=CacheConfig(capacity=63)).generate([prompt])
    with pytest.raises(ConfigError, match=r"cache\.capacity"):
        list(generator(max_new_tokens=13, cache=exact).stream(prompt))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt"),
        ([""], {}, "prompt is empty"),
        ([[1], []], {}, "prompt is empty"),
        ([[1, 26]], {}, r"0 \.\. 25, not 26"),
        (["a"], {"tokenizer": None}, "no tokenizer"),
        ([[1] * 73], {}, "73 tokens.*max_length=80"),
    ],
)
def test_prompts_that_cannot_be_continued(prompts, options, message):
    with pytest.raises(UserError, match=message):
        generator(**options).generate(prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None, "stop": ("a",)}, "stop.*tokenizer"),
        (
            {"tokenizer": None, "sampling": SamplingConfig(banned_words=("a",))},
            r"sampling\.banned_words.*tokenizer",
        ),
        ({"trained_depth": None}, "trained_depth.*core"),
        ({"config": PLAIN, "depth": DepthConfig(depth=4)}, r"depth\.depth.*no recurrent core"),
        ({"config": PLAIN, "strategy": "speculative"}, "strategy.*speculative"),
        ({"cache": CacheConfig(slots=4)}, r"cache\.slots.*exceeds depth=3"),
    ],
)
def test_options_that_do_not_fit_the_model(options, message):
    with pytest.raises(UserError, match=message):
        generator(**options)


def test_a_tokenizer_that_does_not_fit_the_model():
    with pytest.raises(ValueError, match="vocabulary of 32 and the tokenizer one of 259"):
        generator(tokenizer=BYTES, stop=("a",))


def test_a_plain_model_has_no_trained_depth():
    with pytest.raises(UserError, match=r"trained_depth.*none"):
        Generator(*make(PLAIN), PIECES, GenerationConfig(), trained_depth=4)


def test_one_text_is_streamed():
    with pytest.raises(ConfigError, match="num_samples"):
        next(generator(num_samples=2).stream("a"))


def test_ids_may_be_rows_of_an_array_and_need_no_tokenizer():
    array = np.array([PROMPTS[0], PROMPTS[0][::-1]])
    given = generator(PLAIN, tokenizer=None, strategy="greedy", batch_size=1)
    completions = given.generate(array)
    assert_same(given.generate(array.tolist()), completions)
    for row, completion in zip(array, completions, strict=True):
        # Nothing is banned, and nothing ends a text but its length.
        wanted = recomputed_greedy(*make(PLAIN), row.tolist(), 8)
        assert completion.token_ids == tuple(wanted)
        assert (completion.prompt, completion.text) == (None, "")
        assert completion.finish_reason == "length"
    tokens = list(given.stream(jnp.asarray(array[0])))
    assert tuple(token.token_id for token in tokens) == completions[0].token_ids
    assert {token.text for token in tokens} == {""}


def test_a_tokenizer_whose_start_token_is_its_end_token():
    """As GPT-2's: the prompt begins with it, and a text still ends at it."""

    class OneSpecial(Pieces):
        bos_id = eos_id = pad_id = 2

    texts = generator(tokenizer=OneSpecial(), max_new_tokens=30, num_samples=3).generate(["ab"])
    assert {text.finish_reason for text in texts} >= {"end_of_text"}
    for text in texts:
        assert 2 not in text.token_ids
        assert text.text == PIECES.decode(text.token_ids)


def test_all_end_tokens_of_a_published_tokenizer_end_a_text():
    """Chat models have one for a turn besides the one for a text."""
    vocabulary = {f"w{token}": token for token in range(32)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    prompt = [0, 9, 4]
    turn_end = int(np.argmax(all_logits(*make(PLAIN), prompt)[-1]))
    tokenizer = HuggingFaceTokenizer(words.to_str(), 0, 1, 1, end_ids=(1, turn_end))
    completion = generator(PLAIN, tokenizer, strategy="greedy").generate(["w9 w4"])[0]
    assert (completion.text, completion.token_ids) == ("", ())
    assert completion.finish_reason == "end_of_text"
