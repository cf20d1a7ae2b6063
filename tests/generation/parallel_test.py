"""The parallel sampler against token-by-token decoding, where both must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import DEPTH, PLAIN, PROMPTS, TINY, Pieces, depth_rule, make, tiny

from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation import parallel as parallel_sampler
from megatransformer_jax.generation.decode_loop import DecodeSettings, decode, start
from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    EXHAUSTED,
    LENGTH,
    STOP,
    Ending,
    piece_table,
    stop_strings,
)
from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.parallel import rows_needed, sample_parallel, widths
from megatransformer_jax.generation.prefill import left_padded, prefill
from megatransformer_jax.generation.processors.cuts import Temperature
from megatransformer_jax.generation.processors.penalties import MinNewTokens, NoRepeatNgram
from megatransformer_jax.generation.processors.processor import AllowedTokens
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache

CAPACITY, COUNT, W, ROWS = 64, 12, 4, 3
# Deep enough that the contractive model below forgets where it came from.
DEEP = 40
MIXED = tiny(
    attention={"num_kv_heads": 2, "window": 6},
    positions={"scheme": "alibi"},
    recurrence={"state_init": "normal"},
)


def contractive(config=MIXED):
    """A model whose core forgets its state: a tenth of it enters the next iteration."""
    model, params = make(config)
    core = dict(params["core"])
    adapter = dict(core["adapter"])
    adapter["state_kernel"] = 0.1 * adapter["state_kernel"]
    return model, {**params, "core": {**core, "adapter": adapter}}


def per_row(value, dtype=jnp.int32):
    """Always [B], so that nothing compiles twice."""
    return jnp.broadcast_to(jnp.asarray(value, dtype), (ROWS,))


def settings(
    depth=DEPTH, *, end_ids=(-1, -1), count=COUNT, temperature=1.5, stops=None, chain=(), seed=8,
    **options,
):  # fmt: skip
    temperatures = Temperature(per_row(temperature, jnp.float32))
    return DecodeSettings(
        depth_rule(per_row(depth)),
        (*chain, temperatures),
        Ending(jnp.asarray(end_ids, jnp.int32), per_row(count), stops),
        jax.random.split(jax.random.key(seed), ROWS),
        is_drawn=True,
        **options,
    )


def begin(model_and_params, given, prompts=PROMPTS, num_slots=1):
    model, params = model_and_params
    history = history_of_prompts(prompts, CAPACITY, pad_id=0)
    cache = init_cache(model.config, CacheShape(ROWS, CAPACITY, num_slots=num_slots,
        dtype=jnp.dtype(jnp.float32), platform="cpu"))  # fmt: skip
    prompts = left_padded(history, given.row_keys, 16)
    prefilled = prefill(model, params, prompts, cache, given.rule)
    return start(given, prefilled, history)


def parallel(model, given, iterations=2, threshold=1e-9, width=W, prompts=PROMPTS, **options):
    return sample_parallel(
        *model,
        given,
        begin(model, given, prompts, **options),
        iterations_per_round=per_row(iterations),
        settle_threshold=per_row(threshold, jnp.float32),
        max_wavefront=width,
    )


def one_by_one(model, given):
    return decode(*model, given, begin(model, given), jnp.int32(CAPACITY))


def new_tokens(state, row):
    first, last = int(state.history.prompt_lengths[row]), int(state.history.lengths[row])
    return np.asarray(state.history.tokens)[row, first:last].tolist()


def all_new_tokens(state):
    return [new_tokens(state, row) for row in range(ROWS)]


def new_steps(state, row):
    first, last = int(state.history.prompt_lengths[row]), int(state.history.lengths[row])
    assert not np.any(np.asarray(state.steps)[row, :first])
    assert not np.any(np.asarray(state.steps)[row, last:])
    return np.asarray(state.steps)[row, first:last].tolist()


def assert_same_texts(got, wanted, atol=1e-4):
    assert all_new_tokens(got) == all_new_tokens(wanted)
    np.testing.assert_allclose(got.scores, wanted.scores, atol=atol)
    assert got.end.reason.tolist() == wanted.end.reason.tolist()
    assert got.cache.next_position.tolist() == wanted.cache.next_position.tolist()


@pytest.mark.parametrize("config", [TINY, MIXED], ids=["rotary", "alibi_window_normal"])
def test_one_position_at_a_time_is_ordinary_decoding(config):
    """Of any model: each token gets all its iterations, then the next one begins."""
    model, given = make(config), settings()
    wanted = one_by_one(model, given)
    assert min(len(set(row)) for row in all_new_tokens(wanted)) > 2
    for iterations in (1, 2, 3, 7):
        got = parallel(model, given, iterations, width=1)
        assert_same_texts(got.state, wanted)
        np.testing.assert_array_equal(got.state.steps, wanted.steps)
        assert int(got.num_rounds) == (COUNT - 1) * -(-DEPTH // iterations)
        assert got.num_iterations.tolist() == [(COUNT - 1) * DEPTH] * ROWS


def test_all_columns_at_once_as_tpus_compute_them_give_the_same(monkeypatch):
    assert (widths(6, "cpu"), widths(6, "tpu")) == ([2, 4, 6], [6])
    wanted = parallel(make(TINY), settings()).state
    monkeypatch.setattr(parallel_sampler, "widths", lambda count, platform: [count])
    parallel_sampler._sample.clear_cache()
    try:
        assert_same_texts(parallel(make(TINY), settings()).state, wanted)
    finally:
        parallel_sampler._sample.clear_cache()


def test_of_a_full_cache_the_last_slot_is_read():
    texts = [
        all_new_tokens(parallel(make(MIXED), settings(), 1, 0.5, width=1, num_slots=slots).state)
        for slots in (1, 8)
    ]
    assert texts[0] == texts[1]


def test_many_positions_at_once_give_the_same_text():
    """If the core converges. A row's draws are those that it makes one by one."""
    model, given = contractive(), settings(DEEP, temperature=[0.0, 0.7, 1.5])
    wanted = one_by_one(model, given)
    assert min(len(set(row)) for row in all_new_tokens(wanted)) > 2
    for iterations, threshold in ((4, 1e-9), (1, 1e-6), (3, 1e-6)):
        got = parallel(model, given, iterations, threshold)
        assert_same_texts(got.state, wanted, atol=1e-3)
        # Columns share their rounds.
        assert int(got.num_rounds) * iterations < 0.5 * (COUNT - 1) * DEEP


def test_no_token_takes_more_than_depth_iterations():
    model = make(MIXED)
    for depth, iterations in ((7, 2), (4, 4), (5, 8)):
        given = settings(depth)
        # Nothing settles by itself, so all go as deep as they may.
        state = parallel(model, given, iterations, 0.0).state
        for row in range(ROWS):
            assert new_steps(state, row) == [depth] * COUNT
        # Everything settles at once: a round is enough.
        result = parallel(model, given, iterations, np.inf)
        for row in range(ROWS):
            assert new_steps(result.state, row)[1:] == [min(iterations, depth)] * (COUNT - 1)
        assert int(result.num_rounds) == COUNT - 1


def test_steps_and_iterations_are_counted():
    model, given = contractive(), settings(DEEP)
    result = parallel(model, given, 2, 1e-2)
    for row in range(ROWS):
        steps = new_steps(result.state, row)
        assert set(steps[1:]) <= {2, 4, 6, 8, 10} and len(set(steps[1:])) > 1
        # Those on tokens that changed later come on top.
        assert int(result.num_iterations[row]) >= sum(steps[1:])
    assert int(result.num_rounds) < 5 * COUNT


def test_rows_do_not_influence_each_other():
    """Of a model that settles nowhere, with rows that differ in speed and in length."""
    model = make(MIXED)
    depths, counts, paces, thresholds = [5, 8, 3], [4, 12, 9], [1, 2, 3], [0.5, 0.6, 0.2]
    given = settings(depths, count=counts)
    together = parallel(model, given, paces, thresholds)
    num_rounds = []
    for row in range(ROWS):

        def others(values, value, row=row):
            return [values[i] if i == row else value for i in range(ROWS)]

        # The row's place decides its key. The other rows have other prompts and numbers.
        alone = parallel(
            model,
            settings(others(depths, 2), count=others(counts, 2)),
            others(paces, 4),
            others(thresholds, 0.9),
            prompts=others(PROMPTS, [3, 4]),
        )
        assert new_tokens(together.state, row) == new_tokens(alone.state, row)
        assert new_steps(together.state, row) == new_steps(alone.state, row)
        assert together.num_iterations[row] == alone.num_iterations[row]
        assert len(new_tokens(alone.state, row)) == counts[row]
        num_rounds.append(int(alone.num_rounds))
    assert int(together.num_rounds) == max(num_rounds) and len(set(num_rounds)) > 1


@pytest.mark.parametrize("iterations, threshold", [(1, 0.9), (2, 0.3), (3, 1e-9)])
def test_an_end_cuts_the_text_exactly(iterations, threshold):
    """Whatever ends a row, the text up to there is that of a row without end."""
    model, pieces, counts = make(MIXED), Pieces(), (12, 7, 11)
    table = piece_table(pieces, MIXED.vocab_size)

    def run(stop, **options):
        given = settings(6, stops=stop_strings((stop,), table), **options)
        return parallel(model, given, iterations, threshold).state

    def text_of(tokens):
        return pieces.decode([token for token in tokens if token < pieces.vocab_size])

    free = all_new_tokens(run("never"))
    assert [len(row) for row in free] == [COUNT] * ROWS
    stop = next(text for text in (text_of(row)[2:4] for row in free) if "\ufffd" not in text)
    end_ids = (31, free[0][4])
    state = run(stop, end_ids=end_ids, count=counts)
    reasons = set()
    for row, count in enumerate(counts):
        is_end = [token in end_ids for token in free[row]]
        is_stop = [stop in text_of(free[row][: size + 1]) for size in range(COUNT)]
        last = np.argmax(np.asarray(is_end) | is_stop | (np.arange(1, COUNT + 1) == count))
        assert new_tokens(state, row) == free[row][: last + 1]
        reason = END_OF_TEXT if is_end[last] else STOP if is_stop[last] else LENGTH
        assert int(state.end.reason[row]) == reason
        reasons.add(reason)
        # Every token but the last one is in the cache.
        length = len(PROMPTS[row]) + last
        assert int(state.cache.next_position[row]) == length
        places = np.asarray(state.cache.positions[row])
        assert sorted(places[places >= 0]) == list(range(length))
    assert len(reasons) > 1


def test_the_cache_holds_the_final_text():
    """The prelude's keys follow from the tokens alone; the core's last ones if it converges."""
    model, given = contractive(), settings(DEEP)
    state = parallel(model, given, 4, 1e-6).state
    ids = [[*PROMPTS[row], *new_tokens(state, row)] for row in range(ROWS)]
    whole = begin(model, given, [row[:16] for row in ids]).cache
    for row in range(ROWS):
        for place in range(min(len(ids[row]) - 1, 16)):
            at, wanted_at = (
                int(np.argmax(np.asarray(cache.positions[row]) == place))
                for cache in (state.cache, whole)
            )
            for part, atol in (("prelude", 1e-5), ("core", 1e-3), ("coda", 1e-3)):
                got, wanted = getattr(state.cache, part), getattr(whole, part)
                values = slice(got.shape[-1] // 2, None)
                got, wanted = got[:, row, :, at, values], wanted[:, row, :, wanted_at, values]
                np.testing.assert_allclose(got, wanted, atol=atol)


def test_decoding_can_go_on_from_there():
    model, given = contractive(), settings(DEEP)
    half = parallel(model, settings(DEEP, count=5), 4, 1e-6).state
    half = half.replace(end=given.ending.init(ROWS))
    got = decode(*model, given, half, jnp.int32(CAPACITY))
    assert_same_texts(got, one_by_one(model, given), atol=1e-3)


def test_processors_that_look_at_the_next_token_only():
    """What is allowed, and no end before a number of tokens: counted for each column."""
    model = contractive()

    def given(is_allowed, least=0, end=-1):
        # The second row may write nothing at all.
        allowed = AllowedTokens(is_allowed & jnp.asarray([[True], [False], [True]]))
        early = MinNewTokens(jnp.int32(least), jnp.int32(end))
        return settings(DEEP, end_ids=(end, -1), chain=(allowed, early))

    some = jnp.arange(MIXED.vocab_size) % 3 != 0
    free = all_new_tokens(parallel(model, given(some), 3, 1e-6).state)
    assert all(token % 3 for row in free for token in row)
    end = free[0][3]
    wanted = one_by_one(model, given(some, 8, end))
    assert_same_texts(parallel(model, given(some, 8, end), 3, 1e-6).state, wanted, atol=1e-3)
    assert wanted.end.reason[1] == EXHAUSTED
    lengths = [len(row) for row in all_new_tokens(wanted)]
    assert lengths[0] >= 8 and lengths[1] == 0 and lengths[2] >= 8
    # Without the processor the first row ends early.
    early = parallel(model, given(some, 0, end), 3, 1e-6).state
    assert len(new_tokens(early, 0)) == free[0].index(end) + 1


def test_a_warm_start_begins_from_the_position_before():
    model, warm = make(MIXED), settings(warm_start=True)
    got = parallel(model, warm, 2, width=1).state
    assert_same_texts(got, one_by_one(model, warm))
    assert all_new_tokens(got) != all_new_tokens(parallel(model, settings(), 2, width=1).state)


def test_other_numbers_compile_nothing():
    model = make(MIXED)
    parallel(model, settings())
    before = parallel_sampler._sample._cache_size()
    for depth, pace, temperature, count in ((9, 4, 0.0, 3), ([1, 2, 3], [3, 1, 2], 2.0, [7, 2, 9])):
        given = settings(depth, end_ids=(4, 9), count=count, temperature=temperature, seed=1)
        parallel(model, given, pace, 0.3, prompts=[[count] * 5 if depth == 9 else [6], [7, 8], [9]])
    assert parallel_sampler._sample._cache_size() == before


def test_what_cannot_work_is_refused():
    model, given = make(MIXED), settings()

    def refuses(message, model=model, given=given, **options):
        with pytest.raises(UserError, match=message):
            parallel(model, given, **options)

    refuses("this model has none", make(PLAIN))
    refuses("iterations_per_round is 0", iterations=[1, 0, 1])
    refuses("max_wavefront 0", width=0)
    refuses("cannot use NoRepeatNgram", given=settings(chain=(NoRepeatNgram(jnp.int32(2), 4),)))
    refuses("exit criterion 'kl'", given=given.replace(rule=depth_rule(3, "kl", 0.1)))
    state = begin(model, given)
    skip = state.replace(cache=state.cache.replace(exited_reads="skip"))
    with pytest.raises(UserError, match="exited_reads='latest', not 'skip'"):
        sample_parallel(
            *model, given, skip, iterations_per_round=per_row(1), settle_threshold=per_row(1),
            max_wavefront=W,
        )  # fmt: skip


def test_the_cache_must_have_room():
    """As many rows as said are enough; one row less is refused."""
    model, count = make(MIXED), CAPACITY - 16 - W
    assert rows_needed(count, W) == CAPACITY - 16
    given = settings(2, count=count)
    got = parallel(model, given, 2, 0.0).state
    assert got.history.num_generated.tolist() == [count] * ROWS
    for row in range(ROWS):
        length = len(PROMPTS[row]) + count - 1
        places = np.asarray(got.cache.positions[row])
        assert sorted(places[places >= 0]) == list(range(length))
    with pytest.raises(UserError, match=f"the cache has {CAPACITY} rows, and {CAPACITY + 1}"):
        parallel(model, settings(2, count=[1, count + 1, 2]))
