"""The history appends, masks and looks back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.history import History, history_of_prompts


def make() -> History:
    return history_of_prompts([[1, 5], [1, 6, 7]], capacity=5, pad_id=9)


def test_prompts_become_rows():
    history = make()
    assert history.tokens.tolist() == [[1, 5, 9, 9, 9], [1, 6, 7, 9, 9]]
    assert history.lengths.tolist() == history.prompt_lengths.tolist() == [2, 3]
    assert history.capacity == 5
    assert history.num_generated.tolist() == [0, 0]


def test_tokens_are_appended_where_asked():
    history = make().append(jnp.array([3, 4]))
    assert history.tokens.tolist() == [[1, 5, 3, 9, 9], [1, 6, 7, 4, 9]]
    history = history.append(jnp.array([8, 8]), jnp.array([True, False]))
    assert history.tokens.tolist() == [[1, 5, 3, 8, 9], [1, 6, 7, 4, 9]]
    assert history.lengths.tolist() == [4, 4]
    assert history.num_generated.tolist() == [2, 1]
    assert history.prompt_lengths.tolist() == [2, 3]


def test_a_full_row_stays():
    history = make()
    for token in range(20, 24):
        history = history.append(jnp.array([token, token]))
    assert history.tokens.tolist() == [[1, 5, 20, 21, 22], [1, 6, 7, 20, 21]]
    assert history.lengths.tolist() == [5, 5]


def test_masks():
    history = make().append(jnp.array([3, 4]))
    expected = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool)
    np.testing.assert_array_equal(history.content_mask(), expected)
    expected = np.array([[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
    np.testing.assert_array_equal(history.generated_mask(), expected)


def test_suffix():
    history = make().append(jnp.array([3, 4]))
    assert history.suffix(4).tolist() == [[-1, 1, 5, 3], [1, 6, 7, 4]]
    assert history.suffix(2).tolist() == [[5, 3], [7, 4]]
    assert history.suffix(2, of_generated=True).tolist() == [[-1, 3], [-1, 4]]
    assert history.suffix(0).shape == (2, 0)


def test_it_passes_through_transformations():
    @jax.jit
    def loop(history: History) -> History:
        return jax.lax.fori_loop(0, 2, lambda step, h: h.append(jnp.full(2, step)), history)

    assert loop(make()).tokens.tolist() == [[1, 5, 0, 1, 9], [1, 6, 7, 0, 1]]
    gathered = jax.tree.map(lambda leaf: leaf[jnp.array([1, 1])], make())
    assert gathered.tokens.tolist() == [[1, 6, 7, 9, 9]] * 2


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt to continue"),
        ([[1], []], "prompt 1 has no token"),
        ([[1], [1, 2, 3]], "prompt 1 has 3 tokens, which leaves no room .* capacity of 3"),
    ],
)
def test_prompts_that_do_not_fit_are_errors(prompts, message):
    with pytest.raises(UserError, match=message):
        history_of_prompts(prompts, capacity=3, pad_id=0)
