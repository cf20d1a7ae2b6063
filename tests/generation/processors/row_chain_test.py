"""Rows with settings of their own get the scores that a chain of each row's settings gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_rows import KINDS, NUM_ROWS, VOCAB_SIZE, random_history, random_logits

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.sampling import SamplingConfig
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.build import build_chain
from megatransformer_jax.generation.processors.penalties import LogitBias, MinNewTokens
from megatransformer_jax.generation.processors.processor import (
    AllowedTokens,
    Chain,
    apply_chain,
    init_chain,
    update_chain,
)
from megatransformer_jax.generation.processors.row_chain import (
    RowChain,
    RowSizes,
    neutral_rows,
    row_numbers,
)

SIZES = RowSizes(num_bias=3, num_ends=2)
PENALTIES = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": -0.3,
    "no_repeat_ngram": 2,
}
CUTS = {"top_k": 4, "top_p": 0.7, "min_p": 0.05, "typical_p": 0.8}
# Of each row: strategy, sampling, logit_bias, min_new_tokens, end_ids.
ROWS = [
    ("greedy", {}, {}, 0, (2,)),
    ("sample", {"temperature": 0.7}, {}, 30, (2, 5)),
    ("sample", {"temperature": 1.5, **PENALTIES, **CUTS}, {3: 2.5, 9: -100.0}, 30, (7,)),
    ("greedy", PENALTIES, {4: 1.0, 5: -1.0, 6: 0.5}, 0, ()),
    ("sample", {"top_p": 0.5, "no_repeat_ngram": 4}, {}, 1, (2,)),
    ("sample", {"top_k": 2, "frequency_penalty": 0.6}, {}, 0, ()),
]
IS_ALLOWED = jnp.arange(VOCAB_SIZE) != 1


def numbers_of(strategy, sampling, logit_bias, min_new_tokens, end_ids):
    return row_numbers(
        SamplingConfig(**sampling),
        is_drawn=strategy == "sample",
        sizes=SIZES,
        logit_bias=logit_bias,
        min_new_tokens=min_new_tokens,
        end_ids=end_ids,
    )


def row_chain(rows: list) -> RowChain:
    numbers = jax.tree.map(lambda *own: jnp.stack(own), *[numbers_of(*row) for row in rows])
    return RowChain(numbers, IS_ALLOWED, VOCAB_SIZE)


def own_chain(strategy, sampling, logit_bias, min_new_tokens, end_ids) -> Chain:
    config = GenerationConfig(strategy=strategy, sampling=SamplingConfig(**sampling))
    chain = list(build_chain(config, None, VOCAB_SIZE))
    ids, bias = list(logit_bias), list(logit_bias.values())
    bias_first = LogitBias(jnp.asarray([ids], jnp.int32), jnp.asarray([bias], jnp.float32))
    ends = MinNewTokens(jnp.int32(min_new_tokens), jnp.asarray(end_ids, jnp.int32))
    is_cut = [type(step).__name__ == "Temperature" for step in chain]
    place = is_cut.index(True) if True in is_cut else len(chain)
    return (bias_first, *chain[:place], ends, AllowedTokens(IS_ALLOWED), *chain[place:])


@jax.jit
def scores_after(chain: Chain, history: History, token: jax.Array, logits: jax.Array) -> jax.Array:
    """The scores once a token has been added to a history."""
    states = init_chain(chain, history)
    longer = history.append(token)
    states = update_chain(chain, states, longer, token)
    return apply_chain(chain, states, longer, logits)


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_the_scores_are_those_of_the_rows_own_chain(row):
    # The same compiled program for every row and kind.
    together = (row_chain(ROWS),)
    for seed, kind in enumerate(KINDS):
        rng = np.random.default_rng(seed)
        history, logits = random_history(rng, num_kinds=6), random_logits(rng, kind)
        tokens = jnp.asarray(rng.integers(0, 6, NUM_ROWS), jnp.int32)
        scores = scores_after(together, history, tokens, logits)[row]
        alone = jax.tree.map(lambda leaf: leaf[row : row + 1], (history, tokens, logits))
        own = scores_after(own_chain(*ROWS[row]), *alone)[0]
        if ROWS[row][0] == "greedy":
            is_best = np.arange(VOCAB_SIZE) == np.argmax(own)
            own = np.where(is_best, own, -np.inf)
        np.testing.assert_array_equal(scores, own)


def test_another_request_in_a_row_compiles_nothing():
    rng = np.random.default_rng(0)
    history, logits = random_history(rng), random_logits(rng, "plain")
    process = jax.jit(lambda chain, history, logits: chain(chain.init(history), history, logits))
    chain = RowChain(neutral_rows(NUM_ROWS, SIZES), IS_ALLOWED, VOCAB_SIZE)
    for row in ROWS:
        put = functools.partial(jax.tree.map, lambda every, own: every.at[2].set(own))
        process(chain.replace(rows=put(chain.rows, numbers_of(*row))), history, logits)
    assert process._cache_size() == 1


def test_neutral_rows_take_the_likeliest_of_what_is_allowed():
    rng = np.random.default_rng(0)
    history, logits = random_history(rng), random_logits(rng, "plain").at[:, 1].set(99.0)
    chain = RowChain(neutral_rows(NUM_ROWS, SIZES), IS_ALLOWED, VOCAB_SIZE)
    assert not chain.rows.is_drawn.any()
    scores = chain(chain.init(history), history, logits)
    assert (np.isfinite(scores).sum(axis=1) == 1).all()
    best = np.argmax(np.where(IS_ALLOWED, logits, -np.inf), axis=1)
    np.testing.assert_array_equal(np.argmax(scores, axis=1), best)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": dict.fromkeys(range(4), 1.0)}, "4 tokens with a logit_bias are more than"),
        ({"end_ids": (1, 2, 3)}, "3 end tokens are more than the 2"),
        ({"sampling": SamplingConfig(no_repeat_ngram=5)}, "5 tokens of no_repeat_ngram"),
        ({"sampling": SamplingConfig(banned_words=("a",))}, "banned_words and forced_words"),
    ],
)
def test_what_has_no_place_is_an_error(options, message):
    options = {"sampling": SamplingConfig(), **options}
    with pytest.raises(UserError, match=message):
        row_numbers(options.pop("sampling"), is_drawn=True, sizes=SIZES, **options)
