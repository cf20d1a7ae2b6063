"""Banned texts are never written, in whatever tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.generation.endings import PieceTable, text_automaton
from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.processors.words import BannedTexts

PIECES = ("x", "a", "b", "ab", "ba", "bab", "aab", "xa")


def automaton(texts):
    contents = [piece.encode() for piece in PIECES]
    sizes = np.array([len(content) for content in contents], np.int32)
    rows = [list(content.ljust(sizes.max(), b"\0")) for content in contents]
    return text_automaton([texts], PieceTable(np.array(rows, np.uint8), sizes))


@jax.jit
def step(processor, state, history, logits):
    scores = processor(state, history, logits)
    token = jnp.argmax(scores, axis=-1)
    history = history.append(token)
    return scores, token, history, processor.update(state, history, token)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.integers(0, 1000),
)
def test_exactly_the_tokens_that_complete_a_text_are_banned(texts, prompt, seed):
    """'x' is always possible, so no row ends. A text may begin in the prompt, or be in it."""
    rng = np.random.default_rng(seed)
    processor = BannedTexts(automaton(texts))
    history = history_of_prompts([prompt], 16, pad_id=0)
    state = processor.init(history)
    text = "".join(PIECES[token] for token in prompt)
    for _ in range(8):
        logits = rng.normal(0, 1, (1, len(PIECES))).astype(np.float32)
        scores, token, history, state = step(processor, state, history, jnp.asarray(logits))
        for candidate, piece in enumerate(PIECES):
            ends = range(len(text) + 1, len(text + piece) + 1)
            is_banned = any((text + piece)[:end].endswith(ban) for end in ends for ban in texts)
            assert np.isneginf(scores[0, candidate]) == is_banned
        text += PIECES[int(token[0])]
