"""Which cached tokens are found for a prompt."""

import pytest

from megatransformer_jax.generation.continuous.lanes import RowText
from megatransformer_jax.serving.prefixes import Found, Prefixes, reading_rule

CHUNK = 4
PROMPT = tuple(range(10, 22))  # 11 tokens to read: three chunks.


def held(*texts, rule="rule"):
    prefixes = Prefixes(4, CHUNK)
    for row, ids in enumerate(texts):
        prefixes.place(row, ids, rule)
    return prefixes


def test_the_longest_beginning_is_found_and_the_first_of_equals():
    prefixes = held(PROMPT[:6], (*PROMPT[:9], 99, 98), (*PROMPT[:9], 97, 96))
    assert prefixes.find(PROMPT, "rule") == Found(1, 9, is_most=True)
    assert prefixes.find(PROMPT, "rule", only={0, 2}) == Found(2, 9, is_most=True)
    assert prefixes.find(PROMPT, "rule", multiple=CHUNK) == Found(1, 8, is_most=True)
    # Unless nothing is left to read.
    assert prefixes.find(PROMPT[:10], "rule", multiple=CHUNK) == Found(1, 9, is_most=True)


def test_the_last_token_is_never_copied():
    assert held(PROMPT).find(PROMPT, "rule") == Found(0, len(PROMPT) - 1, is_most=True)


def test_generated_tokens_are_cached_but_for_the_last():
    prefixes = held(PROMPT[:6])
    for token in PROMPT[6:9]:
        prefixes.add(0, token)
    assert prefixes.find(PROMPT, "rule") == Found(0, 8, is_most=True)
    assert prefixes.find(PROMPT, "rule", of_prompts=True) == Found(0, 5, is_most=True)


def test_what_was_never_read_is_not_cached():
    prefixes = held(PROMPT)
    prefixes.cut(0, 8)
    assert prefixes.find(PROMPT, "rule") == Found(0, 8, is_most=True)
    prefixes.cut(0, 0)
    assert prefixes.find(PROMPT, "rule") is None


@pytest.mark.parametrize(
    ("ids", "rule"),
    [
        ((10, 11, 99, 98, 97), "rule"),  # Two tokens spare none of three chunks.
        (PROMPT, "another"),
        ((99, *PROMPT), "rule"),
    ],
)
def test_nothing_is_found_that_is_no_use(ids, rule):
    assert held(ids, rule=rule).find(PROMPT, "rule") is None


def test_a_small_part_of_a_row_is_not_most_of_it():
    assert held((*PROMPT[:8], *range(100, 120))).find(PROMPT, "rule") == Found(0, 8, is_most=False)


def test_rules_say_what_a_cached_prompt_depends_on():
    text = RowText(PROMPT, 4, depth=8, criterion="kl", threshold=0.1, seed=3)
    same = RowText(PROMPT, 9, depth=8, criterion="kl", threshold=0.1, seed=4, is_drawn=True)
    assert reading_rule(text, draws_states=False) == reading_rule(same, draws_states=False)
    assert reading_rule(text, draws_states=True) != reading_rule(same, draws_states=True)
    for change in ({"depth": 9}, {"min_depth": 2}, {"criterion": "cosine"}, {"threshold": 0.2}):
        other = RowText(PROMPT, 4, **{"depth": 8, "criterion": "kl", "threshold": 0.1, **change})
        assert reading_rule(text, draws_states=False) != reading_rule(other, draws_states=False)
    assert reading_rule(RowText(PROMPT, 4, warm_start=True), draws_states=False) is None
    prefixes = held(PROMPT, rule=None)
    assert prefixes.find(PROMPT, None) is None
