"""Forced words always come, are written only when they must, and before the end token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.generation.history import NO_TOKEN, history_of_prompts
from megatransformer_jax.generation.processors.words import ForcedWords, forced_words

EOS = 0
VOCAB_SIZE = 4
PROMPTS = [[1, 2], [3], [1, 1, 1]]
# Overlapping, repeating and containing one another.
WORDS = [[[1, 2, 1]], [[2, 1, 1, 2], [3, 3]], [[3]]]
Row = list[int]


def contains(row: Row, spelling: Row) -> bool:
    size = len(spelling)
    return any(row[start : start + size] == spelling for start in range(len(row) - size + 1))


def expected_scores(logits: np.ndarray, words: list, generated: Row, num_left: int) -> np.ndarray:
    """The rule in plain Python."""
    missing = [word for word in words if not any(contains(generated, s) for s in word)]
    if not missing:
        return logits
    logits = logits.copy()
    logits[EOS] = -np.inf
    if num_left > sum(len(word[0]) for word in missing):
        return logits
    progress = [
        max(
            size
            for size in range(len(word[0]))
            if generated[len(generated) - size :] == word[0][:size]
        )
        for word in missing
    ]
    best = int(np.argmax(progress))
    only = np.full_like(logits, -np.inf)
    only[missing[best][0][progress[best]]] = 0
    return only


@jax.jit
def step(processor: ForcedWords, state, history, logits, key):
    scores = processor(state, history, logits)
    token = jax.random.categorical(key, scores)
    history = history.append(token)
    return scores, history, processor.update(state, history, token)


@pytest.mark.parametrize("num_new", [8, 9, 11, 14, 20])
def test_words_come_and_scores_follow_the_rule(num_new: int):
    rng = np.random.default_rng(num_new)
    processor = forced_words(WORDS, num_new, EOS)
    num_written = num_ended = 0
    for trial in range(6):
        history = history_of_prompts(PROMPTS, 3 + num_new, pad_id=9)
        state = processor.init(history)
        rows: list[Row] = [[] for _ in PROMPTS]
        for place in range(num_new):
            logits = rng.normal(0, 2, (3, VOCAB_SIZE)).astype(np.float32)
            key = jax.random.fold_in(jax.random.key(trial), place)
            scores, history, state = step(processor, state, history, jnp.asarray(logits), key)
            for row, generated in enumerate(rows):
                expected = expected_scores(logits[row], WORDS, generated, num_new - place)
                np.testing.assert_array_equal(scores[row], expected)
                num_written += np.isneginf(expected).sum() == VOCAB_SIZE - 1
                generated.append(int(history.tokens[row, len(PROMPTS[row]) + place]))
        for generated in rows:
            if EOS in generated:
                num_ended += 1
                generated = generated[: generated.index(EOS)]
            for word in WORDS:
                assert any(contains(generated, spelling) for spelling in word)
    assert num_written
    assert num_ended or num_new < 14


def test_a_word_that_the_prompt_has_is_still_missing():
    processor = forced_words([[[1, 2]]], 5, EOS)
    history = history_of_prompts([[1, 2], [3, 1]], 9, pad_id=9)
    state = processor.init(history)
    assert state.tolist() == [[False], [False]]
    history = history.append(jnp.array([2, 1]))  # [1, 2, 2]: 1 is the prompt's
    assert processor.update(state, history, jnp.array([2, 1])).tolist() == [[False], [False]]


def test_words_generated_before_count():
    processor = forced_words([[[1, 2]], [[3]]], 6, EOS)
    history = history_of_prompts([[1], [1]], 9, pad_id=9)
    for tokens in ([1, 3], [2, 3], [2, 1]):
        history = history.append(jnp.array(tokens))
    assert jax.jit(lambda p, h: p.init(h))(processor, history).tolist() == [
        [True, False],
        [False, True],
    ]


def test_rows_may_have_different_words_and_limits():
    spellings = np.full((3, 1, 1, 2), NO_TOKEN)
    spellings[0, 0, 0], spellings[1, 0, 0, 0] = [1, 2], 3  # row 2 has none
    processor = ForcedWords(jnp.asarray(spellings), jnp.array([2, 5, 1]), jnp.int32(EOS))
    history = history_of_prompts(PROMPTS, 9, pad_id=9)
    logits = jnp.zeros((3, VOCAB_SIZE))
    scores = processor(processor.init(history), history, logits)
    assert np.isfinite(scores).tolist() == [
        [False, True, False, False],  # must begin now
        [False, True, True, True],  # has time
        [True, True, True, True],
    ]


def test_a_word_overrides_bans():
    processor = forced_words([[[2]]], 1, EOS)
    history = history_of_prompts([[1]], 9, pad_id=9)
    scores = processor(processor.init(history), history, jnp.full((1, VOCAB_SIZE), -jnp.inf))
    assert scores.tolist() == [[-np.inf, -np.inf, 0, -np.inf]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give at least one word"),
        ([[[1]], []], "no empty one"),
        ([[[1], []]], "no empty one"),
        ([[[1, 2]], [[3, 3], [1]]], "take 4 tokens, more than max_new_tokens=3"),
    ],
)
def test_words_that_cannot_be_forced_are_errors(words, message):
    with pytest.raises(ValueError, match=message):
        forced_words(words, 3, EOS)
