"""The columns' movements against lists, row by row."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.generation.parallel import Wavefront, begin, count_settled, move_up

W, B, WIDTH = 4, 3, 2


def wavefront(tokens, iterations, count, new_column=(W,) * B):
    # A state that says which row and column it is of.
    state = 10 * np.arange(B)[:, None, None] + np.arange(W)[:, None] + np.zeros((B, W, WIDTH))
    return Wavefront(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(state, jnp.float32),
        jnp.asarray(iterations, jnp.int32),
        jnp.asarray(count, jnp.int32),
        jnp.asarray(new_column, jnp.int32),
    )


def test_the_first_column_is_the_last_token():
    state = jnp.arange(6, dtype=jnp.float32).reshape(3, 1, 2)
    first = begin(jnp.asarray([5, 6, 7], jnp.int32), state, jnp.asarray([True, False, True]), W)
    assert first.count.tolist() == [1, 0, 1]
    assert first.tokens[:, 0].tolist() == [5, 6, 7]
    assert first.new_column.tolist() == [0, 0, 0]
    assert first.iterations.tolist() == [[0] * W] * B
    np.testing.assert_array_equal(first.state[:, 0], state[:, 0])
    assert first.is_used.sum() == 2


def test_a_settled_column_with_a_wrong_token_is_not_final():
    drawn = jnp.asarray([[7, 8, 9, 0], [7, 8, 9, 0], [7, 8, 9, 0]], jnp.int32)
    front = wavefront([[1, 7, 8, 9], [1, 7, 5, 9], [1, 7, 8, 9]], np.full((B, W), 2), [4, 4, 2])
    settled = jnp.asarray([[True] * W, [True] * W, [True] * W])
    assert count_settled(front, drawn, settled).tolist() == [4, 2, 2]
    settled = jnp.asarray([[True, False, True, True], [False] + [True] * 3, [True] * W])
    assert count_settled(front, drawn, settled).tolist() == [1, 0, 2]


tokens_of = st.lists(st.lists(st.integers(0, 2), min_size=W, max_size=W), min_size=B, max_size=B)
falling = st.lists(st.integers(1, 5), min_size=W, max_size=W).map(lambda x: sorted(x)[::-1])


@settings(max_examples=30, deadline=None)
@given(
    tokens_of,
    tokens_of,
    st.lists(falling, min_size=B, max_size=B),
    st.lists(st.integers(0, W), min_size=B, max_size=B),
    st.lists(st.integers(0, W), min_size=B, max_size=B),
    st.lists(st.integers(0, 6), min_size=B, max_size=B),
)
def test_moving_up_equals_lists(tokens, drawn, iterations, count, num_final, num_wanted):
    num_final = np.minimum(num_final, count)
    # As many columns stay as tokens may come, at least.
    num_wanted = np.where(np.asarray(count) == 0, 0, np.maximum(num_wanted, count - num_final))
    before = wavefront(tokens, iterations, count)
    after = move_up(
        before,
        jnp.asarray(drawn, jnp.int32),
        jnp.asarray(num_final, jnp.int32),
        jnp.asarray(num_wanted, jnp.int32),
    )
    for row in range(B):
        inputs = [tokens[row][0], *drawn[row]]
        is_same = np.cumprod(np.equal(inputs[:W], tokens[row]))
        columns = [
            (inputs[j], iterations[row][j] * is_same[j], 10 * row + j)
            for j in range(num_final[row], count[row])
        ]
        num_old = len(columns)
        if num_old < min(W, num_wanted[row]) and count[row]:
            # The new one: its state is that of the position before.
            columns.append((inputs[count[row]], 0, 10 * row + count[row] - 1))
        assert after.count[row] == len(columns)
        is_longer = len(columns) > num_old
        assert after.new_column[row] == (num_old if is_longer else W)
        got = list(
            zip(after.tokens[row], after.iterations[row], after.state[row, :, 0], strict=True)
        )
        assert [tuple(map(int, column)) for column in got[: len(columns)]] == columns
        assert np.all(np.diff(after.iterations[row]) <= 0)
