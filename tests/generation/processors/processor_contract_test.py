"""What holds for every processor: state, batch rows, off, exhausted rows, no recompilation."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_rows import CAPACITY, KINDS, NUM_ROWS, VOCAB_SIZE, random_history, random_logits

from megatransformer_jax.config.sampling import SamplingConfig
from megatransformer_jax.generation.endings import PieceTable, text_automaton
from megatransformer_jax.generation.history import NO_TOKEN, History
from megatransformer_jax.generation.processors.cuts import MinP, Temperature, TopK, TopP, Typical
from megatransformer_jax.generation.processors.penalties import (
    CountPenalty,
    LogitBias,
    MinNewTokens,
    NoRepeatNgram,
    RepetitionPenalty,
)
from megatransformer_jax.generation.processors.processor import (
    AllowedTokens,
    Processor,
    apply_chain,
    init_chain,
    is_exhausted,
    update_chain,
)
from megatransformer_jax.generation.processors.row_chain import (
    RowChain,
    RowSizes,
    neutral_rows,
    row_numbers,
)
from megatransformer_jax.generation.processors.words import BannedTexts, forced_words

EOS = 2


def texts(text: str) -> BannedTexts:
    """One letter per token."""
    letters = np.arange(ord("a"), ord("a") + VOCAB_SIZE, dtype=np.uint8)[:, None]
    return BannedTexts(text_automaton([[text]], PieceTable(letters, np.ones(VOCAB_SIZE, np.int32))))


def bias(number: jax.Array, whole: jax.Array) -> LogitBias:
    ids = jnp.broadcast_to(whole, NUM_ROWS)[:, None] + jnp.array([0, 5, VOCAB_SIZE])
    return LogitBias(ids.at[:, 1].set(-1), jnp.broadcast_to(number, NUM_ROWS)[:, None] * ids)


def rows(number: jax.Array, whole: jax.Array) -> RowChain:
    """All numbers of each row other than neutral."""
    one = row_numbers(
        SamplingConfig(), is_drawn=True, sizes=RowSizes(1, 2), logit_bias={3: 1.0}, end_ids=(EOS,)
    )
    numbers = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * NUM_ROWS), one)
    number, whole = (jnp.broadcast_to(given, NUM_ROWS) for given in (number, whole))
    kept = ("bias_ids", "bias", "end_ids")
    counts = ("top_k", "no_repeat_ngram", "min_new_tokens")
    changes = {
        field.name: whole if field.name in counts else number
        for field in dataclasses.fields(numbers)
        if field.name not in kept
    }
    return RowChain(numbers.replace(**changes), jnp.arange(VOCAB_SIZE) != 1, VOCAB_SIZE)


# From two numbers, which every processor of a type takes without compiling again.
MAKERS: dict[str, Callable[[jax.Array, jax.Array], Processor]] = {
    "Temperature": lambda number, whole: Temperature(number),
    "TopK": lambda number, whole: TopK(whole),
    "TopP": lambda number, whole: TopP(number),
    "MinP": lambda number, whole: MinP(number),
    "Typical": lambda number, whole: Typical(number),
    "RepetitionPenalty": lambda number, whole: RepetitionPenalty(number, VOCAB_SIZE),
    "CountPenalty": lambda number, whole: CountPenalty(number, -number / 2, VOCAB_SIZE),
    "NoRepeatNgram": lambda number, whole: NoRepeatNgram(whole, 4),
    "AllowedTokens": lambda number, whole: AllowedTokens(jnp.arange(VOCAB_SIZE) != whole.max()),
    "MinNewTokens": lambda number, whole: MinNewTokens(whole, jnp.int32(EOS)),
    "BannedTexts": lambda number, whole: texts("abc"[: 1 + int(whole.max()) % 3]),
    "ForcedWords": lambda number, whole: forced_words([[[4, int(whole.max())]]], 9, EOS),
    "LogitBias": bias,
    "RowChain": rows,
}
PER_ROW = (jnp.linspace(0.2, 0.9, NUM_ROWS), jnp.arange(1, NUM_ROWS + 1) % 4 + 1)
every_processor = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@jax.jit
def process(processor: Processor, history: History, logits: jax.Array) -> jax.Array:
    return processor(processor.init(history), history, logits)


@jax.jit
def advance(processor, state, history, tokens, where):
    history = history.append(tokens, where)
    return history, processor.update(state, history, tokens)


def choose_rows(is_first: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.where(is_first.reshape(-1, *[1] * (first.ndim - 1)), first, second)


@every_processor
def test_it_is_a_processor_whose_leaves_are_arrays(make):
    processor = make(*PER_ROW)
    assert isinstance(processor, Processor)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(processor))
    state = processor.init(random_history(np.random.default_rng(0)))
    assert all(leaf.shape[0] == NUM_ROWS for leaf in jax.tree.leaves(state))


@every_processor
def test_updating_gives_the_state_of_the_longer_history(make):
    rng = np.random.default_rng(1)
    processor = make(*PER_ROW)
    full = random_history(rng, num_kinds=6)
    history = full.replace(lengths=full.prompt_lengths)
    state = processor.init(history)
    final = jax.jit(lambda p, h: p.init(h))(processor, full)
    rows = np.arange(NUM_ROWS)
    for _ in range(CAPACITY):
        columns = np.minimum(history.lengths, CAPACITY - 1)
        is_running = history.lengths < full.lengths
        updated, next_state = advance(
            processor, state, history, full.tokens[rows, columns], is_running
        )
        state = jax.tree.map(functools.partial(choose_rows, is_running), next_state, state)
        history = updated
    jax.tree.map(np.testing.assert_array_equal, state, final)


@every_processor
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(make, kind):
    rng = np.random.default_rng(2)
    history, logits = random_history(rng, num_kinds=6), random_logits(rng, kind)
    together = process(make(*PER_ROW), history, logits)
    order = rng.permutation(NUM_ROWS)
    permuted = make(*(number[order] for number in PER_ROW))
    shuffled = process(permuted, jax.tree.map(lambda leaf: leaf[order], history), logits[order])
    np.testing.assert_allclose(shuffled, together[order], rtol=1e-6)
    assert not np.isnan(together).any()


@every_processor
def test_other_numbers_compile_nothing(make):
    rng = np.random.default_rng(3)

    @jax.jit
    def run(processor, history, logits):
        return processor(processor.init(history), history, logits)

    results = []
    for number, whole in [(0.3, 1), (0.6, 2), (1.0, 3)]:
        history, logits = random_history(rng), random_logits(rng, "plain")
        results.append(run(make(jnp.float32(number), jnp.int32(whole)), history, logits))
        assert not np.isnan(results[-1]).any()
    assert run._cache_size() == 1
    for scale in (1.0, 0.5):
        run(make(PER_ROW[0] * scale, PER_ROW[1]), history, logits)
    assert run._cache_size() <= 2


@every_processor
def test_an_exhausted_row_is_not_nan(make):
    history = random_history(np.random.default_rng(4))
    logits = jnp.full((NUM_ROWS, VOCAB_SIZE), -jnp.inf)
    processor = make(*PER_ROW)
    scores = process(processor, history, logits)
    assert not np.isnan(scores).any()
    if "ForcedWords" not in type(processor).__name__:  # it has the last word
        assert is_exhausted(scores).all()


def neutral() -> RowChain:
    """Rows that draw from the model's own distribution."""
    numbers = neutral_rows(NUM_ROWS, RowSizes(1, 1)).replace(temperature=jnp.ones(NUM_ROWS))
    return RowChain(numbers, jnp.ones(VOCAB_SIZE, bool), VOCAB_SIZE)


# Made in each test: JAX on a loaded CPU was seen to lose the value of a number that was made when
# the module was imported.
OFF = {
    "temperature": lambda: Temperature(jnp.float32(1)),
    "top_k": lambda: TopK(jnp.int32(VOCAB_SIZE)),
    "more_than_all": lambda: TopK(jnp.int32(10**6)),
    "top_p": lambda: TopP(jnp.float32(1)),
    "min_p": lambda: MinP(jnp.float32(0)),
    "typical": lambda: Typical(jnp.float32(1)),
    "repetition": lambda: RepetitionPenalty(jnp.float32(1), VOCAB_SIZE),
    "counts": lambda: CountPenalty(jnp.float32(0), jnp.float32(0), VOCAB_SIZE),
    "ngram": lambda: NoRepeatNgram(jnp.int32(0), 4),
    "min_new": lambda: MinNewTokens(jnp.int32(0), jnp.int32(EOS)),
    "bias": lambda: LogitBias(jnp.full((NUM_ROWS, 2), NO_TOKEN), jnp.ones((NUM_ROWS, 2))),
    "rows": neutral,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", OFF.values(), ids=OFF.keys())
def test_off_changes_nothing(make, kind):
    rng = np.random.default_rng(5)
    history, logits = random_history(rng, num_kinds=3), random_logits(rng, kind)
    logits = logits.at[0, 0].set(-200.0)  # a probability of 0 in float32
    np.testing.assert_array_equal(process(make(), history, logits), logits)


def test_temperature_zero_leaves_the_likeliest():
    history = random_history(np.random.default_rng(6))
    logits = random_logits(np.random.default_rng(6), "ties")
    temperature = jnp.array([0, 1, 0, 2, 0, 1e-30], jnp.float32)
    scores = process(Temperature(temperature), history, logits)
    is_greedy = np.asarray(temperature) < 1e-5
    assert (np.isfinite(scores).sum(axis=1)[is_greedy] == 1).all()
    np.testing.assert_array_equal(np.argmax(scores, axis=1), np.argmax(logits, axis=1))
    np.testing.assert_array_equal(scores[1], logits[1])


def test_top_p_keeps_the_first_of_equal_ones():
    history = random_history(np.random.default_rng(7))
    logits = jnp.zeros((NUM_ROWS, VOCAB_SIZE))
    kept = np.isfinite(process(TopP(jnp.float32(0.5)), history, logits))
    assert kept.tolist() == [[True] * 12 + [False] * 11] * NUM_ROWS


@pytest.mark.parametrize("cut", [TopP, Typical])
def test_a_share_that_float32_takes_for_none_keeps_a_token(cut):
    rng = np.random.default_rng(7)
    history, logits = random_history(rng), random_logits(rng, "plain")
    scores = process(cut(jnp.float32(1e-50)), history, logits)
    assert (np.isfinite(scores).sum(axis=1) == 1).all()


def test_a_chain_in_a_loop_equals_step_by_step():
    """Every processor at once, per-row numbers, compiled with the loop; other numbers do not."""
    table = jax.random.normal(jax.random.key(0), (VOCAB_SIZE, VOCAB_SIZE)) * 2
    rows = jnp.arange(NUM_ROWS)

    def start(history):
        return history.replace(lengths=history.prompt_lengths)

    def one_token(chain, states, history):
        logits = table[history.tokens[rows, history.lengths - 1]]
        scores = apply_chain(chain, states, history, logits.astype(jnp.bfloat16))
        assert scores.dtype == jnp.float32
        token = jnp.argmax(scores, axis=-1)
        history = history.append(token)
        return update_chain(chain, states, history, token), history

    @jax.jit
    def loop(chain, history):
        return jax.lax.while_loop(
            lambda carry: jnp.min(carry[1].lengths) < CAPACITY,
            lambda carry: one_token(chain, *carry),
            (init_chain(chain, history), history),
        )[1]

    single = jax.jit(one_token)
    for seed, scale in [(0, 1.0), (1, 0.5)]:
        history = start(random_history(np.random.default_rng(seed)))
        numbers = (PER_ROW[0] * scale, jnp.roll(PER_ROW[1], seed))
        chain = tuple(make(*numbers) for make in MAKERS.values())
        states, stepped = init_chain(chain, history), history
        while int(jnp.min(stepped.lengths)) < CAPACITY:
            states, stepped = single(chain, states, stepped)
        jax.tree.map(np.testing.assert_array_equal, loop(chain, history), stepped)
    assert loop._cache_size() == 1
