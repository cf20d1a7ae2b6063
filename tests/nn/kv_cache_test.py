"""Slots, and what is where in a cache after writes, drops and changes of sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.nn.kv_cache import (
    BLOCK_ROWS,
    SHARINGS,
    CacheShape,
    drop_rows,
    init_cache,
    pair_width,
    repeat_sequences,
    rows_to_blocks,
    slot_for,
    take_sequences,
    visible_positions,
    write_rows,
)
from megatransformer_jax.ops.cached_attention import apart

CONFIG = ModelConfig(width=8, prelude_layers=1, core_layers=2, coda_layers=0)
PLAIN = ModelConfig(width=8, core_layers=0, recurrence=RecurrenceConfig())
SLOTS, HEADS, HEAD_DIM = 3, 4, 2
ITERATIONS = 40


def empty(config=CONFIG, batch_size=2, capacity=8, **options):
    defaults = {"num_slots": SLOTS, "dtype": jnp.dtype(jnp.float32), "platform": "cpu"}
    return init_cache(config, CacheShape(batch_size, capacity, **(defaults | options)))


def filled(start, positions):
    """Rows whose numbers tell everything: entry, sequence, row (from `start` on), key or value."""
    batch_size, num_rows = np.shape(positions)

    def entries(count):
        shape = (count, batch_size, HEADS, num_rows, HEAD_DIM)
        entry, sequence, _, row, _ = np.meshgrid(*map(np.arange, shape), indexing="ij")
        number = 1000.0 * entry + 100 * sequence + row + start
        return jnp.asarray(np.concatenate([number, -number], axis=-1), jnp.float32)

    steps = np.where(np.asarray(positions) >= 0, 1 + np.arange(num_rows), 0)
    rows = (entries(1), entries(2 * SLOTS), entries(0))
    return rows, jnp.asarray(positions, jnp.int32), jnp.asarray(steps, jnp.int32)


def two_writes():
    """Five rows. The first sequence has 3 + 2 tokens; the second 2 (padded on the left) + 1."""
    cache = write_rows(empty(), *filled(1, [[0, 1, 2], [-1, 0, 1]]))
    return write_rows(cache, *filled(4, [[3, 4], [2, -1]]))


def assert_same(cache, wanted):
    assert jax.tree.structure(cache) == jax.tree.structure(wanted)
    for array, other in zip(jax.tree.leaves(cache), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 8])
def test_slots_of_all_iterations(sharing, num_slots):
    """First all slots in order, then those that are shared, over and over."""
    shared = {
        "modulo": range(num_slots),
        "last": [num_slots - 1],
        "anchor": range(num_slots // 2, num_slots),
    }[sharing]
    series = itertools.chain(range(num_slots), itertools.cycle(shared))
    wanted = list(itertools.islice(series, ITERATIONS))
    assert [int(slot_for(i, num_slots, sharing)) for i in range(ITERATIONS)] == wanted
    traced = jax.jit(lambda i: slot_for(i, num_slots, sharing))
    assert [int(traced(jnp.int32(i))) for i in range(ITERATIONS)] == wanted


@settings(max_examples=50, deadline=None)
@given(
    sharing=st.sampled_from(SHARINGS), num_slots=st.integers(1, 64), iteration=st.integers(0, 1000)
)
def test_a_slot_exists_and_none_is_taken_before_its_turn(sharing, num_slots, iteration):
    slot = int(slot_for(iteration, num_slots, sharing))
    assert 0 <= slot < num_slots
    assert slot == iteration if iteration < num_slots else slot <= iteration


def test_a_new_cache_is_empty():
    cache = empty(capacity=65)
    assert cache.capacity == 128
    assert cache.block_rows == BLOCK_ROWS["cpu"]
    assert cache.prelude.shape == (1, 2, HEADS, 128, 2 * HEAD_DIM)
    assert cache.core.shape == (2 * SLOTS, 2, HEADS, 128, 2 * HEAD_DIM)
    assert cache.coda.shape == (0, 2, HEADS, 128, 2 * HEAD_DIM)
    assert np.all(cache.positions == -1)
    assert not np.any(cache.num_steps)
    assert cache.length == 0
    assert empty(PLAIN).core is None
    assert empty(dtype=jnp.dtype(jnp.bfloat16)).core.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("head_width", "width"), [(16, 128), (64, 128), (80, 256), (96, 256), (128, 256), (192, 384)]
)
def test_pairs_fill_whole_lanes_of_a_tpu(head_width, width):
    assert pair_width(head_width, "tpu") == width
    assert pair_width(head_width, "cpu") == pair_width(head_width, "gpu") == 2 * head_width


@pytest.mark.parametrize("platform", BLOCK_ROWS)
def test_capacity_is_whole_blocks(platform):
    block = BLOCK_ROWS[platform]
    rows = [rows_to_blocks(rows, platform) for rows in (1, block, block + 1)]
    assert rows == [block, block, 2 * block]


@pytest.mark.parametrize(
    ("capacity", "options", "problem"),
    [
        (0, {}, "capacity is 0"),
        (8, {"num_slots": 0}, "slots are 0"),
        (8, {"sharing": "middle"}, r"'middle'; choose one of \('modulo', 'anchor', 'last'\)"),
        (8, {"exited_reads": "all"}, r"'all'; choose one of \('latest', 'skip'\)"),
        (8, {"platform": "abacus"}, r"'abacus'; choose one of \('cpu', 'gpu', 'tpu'\)"),
    ],
)
def test_what_cannot_be_used_is_refused(capacity, options, problem):
    with pytest.raises(UserError, match=problem):
        empty(capacity=capacity, **options)


def test_unknown_sharing_has_no_slots():
    with pytest.raises(ValueError, match=r"'middle'; choose one of \('modulo', 'anchor', 'last'\)"):
        slot_for(3, 2, "middle")


def test_rows_are_written_one_pass_after_the_other():
    cache = two_writes()
    assert cache.length == 5
    assert cache.next_position.tolist() == [5, 3]
    assert cache.positions[:, :6].tolist() == [[0, 1, 2, 3, 4, -1], [-1, 0, 1, 2, -1, -1]]
    assert cache.num_steps[:, :6].tolist() == [[1, 2, 3, 1, 2, 0], [0, 2, 3, 1, 0, 0]]
    # Rows 1 to 5 of every entry and sequence; nothing behind them.
    for entries, count in ((cache.prelude, 1), (cache.core, 2 * SLOTS)):
        number = np.arange(count)[:, None, None] * 1000.0 + 100 * np.arange(2)[:, None]
        number = number + np.arange(1, 6)
        for array, sign in zip(apart(entries, HEAD_DIM), (1, -1), strict=True):
            for head, channel in np.ndindex(HEADS, HEAD_DIM):
                np.testing.assert_array_equal(array[:, :, head, :5, channel], sign * number)
            assert not np.any(array[..., 5:, :])


def test_rows_are_rounded_to_the_caches_type():
    cache = empty(dtype=jnp.dtype(jnp.bfloat16))
    cache = write_rows(cache, *filled(1.0009765625, [[0], [0]]))
    assert cache.core.dtype == jnp.bfloat16
    assert cache.core[0, 0, 0, 0, 0] == 1


def test_a_plain_model_has_no_core_to_write():
    (outer, *_), *numbers = filled(1, [[0], [0]])
    cache = write_rows(empty(PLAIN), (outer, None, outer), *numbers)
    assert cache.core is None
    assert cache.coda[0, 1, 0, 0, 0] == 101


def test_readers_that_skip_see_only_who_wrote_their_slot():
    cache = two_writes()
    np.testing.assert_array_equal(visible_positions(cache, 2), cache.positions)
    skipping = cache.replace(exited_reads="skip")
    # Steps are [1, 2, 3, 1, 2] and [0, 2, 3, 1, 0].
    wanted = {
        0: [[0, 1, 2, 3, 4], [-1, 0, 1, 2, -1]],
        1: [[-1, 1, 2, -1, 4], [-1, 0, 1, -1, -1]],
        2: [[-1, -1, 2, -1, -1], [-1, -1, 1, -1, -1]],
    }
    for slot, rows in wanted.items():
        assert visible_positions(skipping, slot)[:, :5].tolist() == rows
        assert visible_positions(skipping, jnp.int32(slot))[:, :5].tolist() == rows


def test_sequences_are_taken_with_all_that_is_theirs():
    cache = two_writes()
    taken = take_sequences(cache, jnp.asarray([1, 1, 0]))
    assert taken.next_position.tolist() == [3, 3, 5]
    assert taken.length == 5
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(taken), strict=True):
        axis = {5: 1, 2: 0, 1: 0}.get(before.ndim)
        if axis is not None:
            np.testing.assert_array_equal(after, np.take(before, [1, 1, 0], axis))
    assert take_sequences(empty(PLAIN), jnp.asarray([0])).core is None


def test_sequences_are_repeated_next_to_each_other():
    cache = two_writes()
    repeated = repeat_sequences(cache, 2)
    taken = take_sequences(cache, jnp.asarray([0, 0, 1, 1]))
    assert_same(repeated, taken)


def test_dropped_rows_are_freed_or_hidden():
    """The first sequence keeps one of two tokens, the second none of one."""
    cache = drop_rows(two_writes(), jnp.asarray([[True, False], [False, False]]))
    assert cache.length == 4
    assert cache.next_position.tolist() == [4, 2]
    assert cache.positions[:, :5].tolist() == [[0, 1, 2, 3, -1], [-1, 0, 1, -1, -1]]
    assert cache.num_steps[:, :5].tolist() == [[1, 2, 3, 1, 0], [0, 2, 3, 0, 0]]
    # The next pass goes over the freed row, not over the gap.
    cache = write_rows(cache, *filled(9, [[4], [2]]))
    assert cache.length == 5
    assert cache.positions[:, :5].tolist() == [[0, 1, 2, 3, 4], [-1, 0, 1, -1, 2]]
    np.testing.assert_array_equal(cache.core[0, 1, 0, :5, 0], [101, 102, 103, 104, 109])


def test_all_or_nothing_can_be_dropped():
    cache = two_writes()
    assert_same(drop_rows(cache, jnp.ones((2, 2), bool)), cache)
    nothing = drop_rows(cache, jnp.zeros((2, 5), bool))
    assert nothing.length == 0
    assert nothing.next_position.tolist() == [0, 0]
    assert np.all(nothing.positions == -1)
    assert not np.any(nothing.num_steps)


rounds = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
    max_size=6,
)
_write_rows, _drop_rows = jax.jit(write_rows), jax.jit(drop_rows)


@settings(max_examples=30, deadline=None)
@given(rounds=rounds)
def test_what_is_kept_is_a_sequence_without_holes_in_rows_that_are_not_too_early(rounds):
    """Passes of 3 rows with 0 to 3 tokens, of which 0 to all stay: like two growing lists."""
    cache, kept, used = empty(capacity=18), [[], []], 0
    for index, (first, second, keep_first, keep_second) in enumerate(rounds):
        sizes = np.asarray([[first], [second]])
        keeps = np.minimum(sizes, [[keep_first], [keep_second]])
        columns = np.arange(3)
        places = np.asarray(cache.next_position)[:, None] + columns
        positions = np.where(columns < sizes, places, -1)
        cache = _write_rows(cache, *filled(10 * index, positions))
        cache = _drop_rows(cache, jnp.asarray(columns < keeps))
        for row, keep in enumerate(keeps[:, 0]):
            kept[row] += [100 * row + 10 * index + column for column in range(keep)]
        used += keeps.max()
    assert cache.length == used
    assert cache.next_position.tolist() == [len(row) for row in kept]
    for row, numbers in enumerate(kept):
        (where,) = np.nonzero(np.asarray(cache.positions[row]) >= 0)
        assert cache.positions[row][where].tolist() == list(range(len(numbers)))
        assert np.all(where >= np.arange(len(where)))  # What windows rely on.
        assert cache.prelude[0, row, 0, where, 0].tolist() == numbers
        assert np.all((cache.num_steps[row] > 0) == (cache.positions[row] >= 0))
