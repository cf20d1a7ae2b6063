"""Drawn tokens have the distribution of the model at full depth, after the logits processors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chi_square import p_value
from speculative_start import begin, decoded, read_prompts, rows, settings, speculated
from tiny_model import PROMPTS, TINY, make, tiny

from megatransformer_jax.generation.decode_loop import start
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.prefill import repeat_rows
from megatransformer_jax.generation.processors.cuts import Temperature, TopP
from megatransformer_jax.generation.processors.penalties import RepetitionPenalty
from megatransformer_jax.generation.processors.processor import apply_chain, init_chain
from megatransformer_jax.generation.speculative import speculate

V, COUNT, ROWS, DEPTH = 4, 4, 4096, 4
SMALL = tiny(
    vocab_size=V,
    width=8,
    max_length=16,
    attention={"num_heads": 2, "num_kv_heads": 1},
)
PROMPT = [1, 3, 0]
CHAINS = {
    "none": (),
    "processed": (
        RepetitionPenalty(jnp.float32(2.5), V),
        Temperature(jnp.float32(0.8)),
        TopP(jnp.float32(0.9)),
    ),
}


@jax.jit
def next_probs(texts, size, chain, depth):
    """Distribution behind `size` new tokens of each text, [texts, V], without a cache."""
    model, params = make(SMALL)
    lengths = jnp.full(len(texts), len(PROMPT) + size)
    logits = model.apply({"params": params}, texts, num_steps=depth).logits
    logits = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]
    history = History(texts, lengths, jnp.full_like(lengths, len(PROMPT)))
    return jax.nn.softmax(apply_chain(chain, init_chain(chain, history), history, logits))


def joint_probs(chain, depth):
    """Probability of every continuation, an axis per token."""
    new = itertools.product(range(V), repeat=COUNT - 1)
    texts = jnp.asarray([[*PROMPT, *tokens] for tokens in new], jnp.int32)
    joint = np.ones((V,) * COUNT)
    for size in range(COUNT):
        probs = np.asarray(next_probs(texts, jnp.int32(size), chain, jnp.int32(depth)), np.float64)
        # Later tokens of a text do not matter; those of the first text with these ones are 0.
        probs = probs.reshape((V,) * COUNT)[(..., *(0,) * (COUNT - 1 - size), slice(None))]
        joint *= probs.reshape((V,) * (size + 1) + (1,) * (COUNT - 1 - size))
    return joint


def drawn(chain, draft_depth, draft_length):
    """How often each continuation was drawn, and the statistics."""
    given = settings(DEPTH, COUNT, chain=chain, num_rows=ROWS, is_drawn=True)
    alone = dataclasses.replace(given, row_keys=given.row_keys[:1])
    prefilled, history = read_prompts(SMALL, alone, prompts=[PROMPT], num_slots=DEPTH)
    history = jax.tree.map(lambda array: jnp.repeat(array, ROWS, axis=0), history)
    state = start(given, repeat_rows(prefilled, ROWS), history)
    state, stats = speculate(
        *make(SMALL), given, state, draft_depth=draft_depth, draft_length=draft_length
    )
    counts = np.zeros((V,) * COUNT)
    new = np.asarray(state.history.tokens)[:, len(PROMPT) : len(PROMPT) + COUNT]
    np.add.at(counts, tuple(new.T), 1)
    return counts, stats


@pytest.mark.parametrize("name", CHAINS)
def test_continuations_are_distributed_as_at_full_depth(name):
    """All tokens together, against an exact enumeration."""
    chain = CHAINS[name]
    counts, stats = drawn(chain, draft_depth=1, draft_length=2)
    accepted = np.sum(stats.num_accepted) / np.sum(stats.num_drafted)
    assert 0.2 < accepted < 0.9
    assert p_value(counts, joint_probs(chain, DEPTH)) > 0.01
    # The drafts alone, or the model without its processors, would be found out.
    assert p_value(counts, joint_probs(chain, 1)) < 1e-6
    other = next(other for other in CHAINS if other != name)
    assert p_value(counts, joint_probs(CHAINS[other], DEPTH)) < 1e-6


def warm(temperatures):
    temperatures = jnp.asarray(temperatures, jnp.float32)
    chain = (RepetitionPenalty(jnp.float32(1.2), TINY.vocab_size), Temperature(temperatures))
    return settings(chain=chain, is_drawn=True)


def test_cold_rows_are_greedy_beside_others_that_draw():
    given = warm([0.0, 1.0, 0.0])
    state, stats = speculated(TINY, given, draft_depth=2)
    wanted = rows(decoded(TINY, dataclasses.replace(given, is_drawn=False)))
    got = rows(state)
    assert got[0] == wanted[0] and got[2] == wanted[2]
    assert got[1] != wanted[1]
    assert np.sum(stats.num_accepted) > 0


def test_draws_depend_on_a_rows_own_key_and_text_alone():
    """Neither on the other rows, nor on where a call ends, and again they are the same."""
    given, model = warm([1.5, 1.5, 1.5]), make(TINY)
    wanted = rows(speculated(TINY, given, draft_depth=2)[0])
    state = begin(TINY, given)
    for _ in range(50):
        state, _ = speculate(*model, given, state, draft_depth=2, draft_length=3, max_rounds=1)
    assert rows(state) == wanted
    order = jnp.array([2, 0, 2])
    shuffled = dataclasses.replace(given, row_keys=given.row_keys[order])
    state, _ = speculated(TINY, shuffled, 2, prompts=[PROMPTS[row] for row in order])
    assert rows(state) == [wanted[row] for row in order]
    other = dataclasses.replace(given, row_keys=jax.random.split(jax.random.key(9), 3))
    assert rows(speculated(TINY, other, 2)[0]) != wanted
