"""Streams: how many tokens a call makes, and that none waits longer than its text must."""

import pytest
from tiny_generator import NO_END, generator

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.generation import generator as generator_module
from megatransformer_jax.generation.streaming import (
    MAX_TOKENS_PER_CALL,
    Pace,
    TokenStream,
    next_count,
)

BYTES = BytesTokenizer()
PROMPT = [1, 9, 4, 20]


def counts(seconds_per_token, num_calls):
    """Tokens of each call of a device that takes so long for each."""
    found = [1]
    for _ in range(num_calls - 1):
        found.append(next_count(found[-1], found[-1] * seconds_per_token))
    return found


def test_calls_grow_until_they_take_as_long_as_nobody_notices():
    assert counts(1e-4, 9) == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert MAX_TOKENS_PER_CALL == 64
    assert counts(0.004, 6) == [1, 2, 4, 8, 12, 12]
    assert counts(0.03, 4) == [1, 1, 1, 1]
    # A call that waited for somebody, and one without a measurable time.
    assert next_count(64, 3.2) == 1
    assert next_count(8, 0.0) == 16
    with pytest.raises(ValueError, match="count is 0"):
        next_count(0, 0.1)


def test_a_number_of_tokens_is_kept_and_checked():
    pace = Pace(3)
    for _ in range(2):
        assert pace.begin() == 3
        pace.end()
    for wrong in (0, True):
        with pytest.raises(ConfigError, match="tokens_per_call"):
            Pace(wrong)
    with pytest.raises(ConfigError, match=r"tokens_per_call.*-1"):
        generator(strategy="greedy").stream(PROMPT, tokens_per_call=-1)  # At once.


@pytest.mark.parametrize("per_call", [1, 3, 50])
def test_the_same_tokens_come_in_fewer_calls(per_call, monkeypatch):
    given = generator(strategy="greedy", end_ids=NO_END, max_new_tokens=14)
    wanted = given.generate([PROMPT])[0]
    asked = []
    add_tokens = generator_module.add_tokens

    def counted(*args, max_tokens, **options):
        asked.append(max_tokens)
        return add_tokens(*args, max_tokens=max_tokens, **options)

    monkeypatch.setattr(generator_module, "add_tokens", counted)
    tokens = list(given.stream(PROMPT, per_call))
    assert tuple(token.token_id for token in tokens) == wanted.token_ids
    assert "".join(token.text for token in tokens) == wanted.text
    # The first token is the prompt's.
    assert asked == [per_call] * -(-13 // per_call)


def test_the_first_token_waits_for_nothing_but_the_prompt(monkeypatch):
    given = generator(strategy="greedy", end_ids=NO_END, max_new_tokens=14)
    wanted = given.generate([PROMPT])[0].token_ids[0]
    monkeypatch.setattr(generator_module, "add_tokens", lambda *args, **options: 1 / 0)
    stream = given.stream(PROMPT)
    assert next(stream).token_id == wanted
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_a_token_waits_only_while_its_text_does():
    """Part of a character waits, and so does what may become a stop text."""
    a, b, *euro = BYTES.encode("ab\u20ac")
    new = [a, b, *euro, euro[0]]
    stream = TokenStream(BYTES, [BYTES.bos_id], ("bc",), lambda token: False)

    def take(count, is_over=False):
        found = stream.take(new[:count], [1] * count, (), is_over=is_over)
        return [(token.token_id, token.text) for token in found]

    assert take(1) == [(a, "a")]
    assert take(2) == []
    assert take(3) == [(b, "")]
    assert take(5) == [(euro[0], ""), (euro[1], ""), (euro[2], "b\u20ac")]
    assert take(6) == []
    assert take(6, is_over=True) == [(euro[0], "\ufffd")]
