"""The mean of parameter trees, against NumPy's."""

import weakref

import ml_dtypes
import numpy as np
import pytest

from megatransformer_jax.checkpoints.averaging import average_trees
from megatransformer_jax.checkpoints.compatibility import CheckpointMismatch


def trees(count: int, dtype=np.float32) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {"core": {"kernel": rng.normal(size=(4, 3)).astype(dtype)}, "scale": np.ones(3, dtype)}
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_mean_is_numpys_in_float64_rounded_once(dtype):
    given = trees(7, dtype)
    mean = average_trees(iter(given))
    stacked = np.stack([tree["core"]["kernel"].astype(np.float64) for tree in given])
    np.testing.assert_array_equal(mean["core"]["kernel"], stacked.mean(axis=0).astype(dtype))
    assert mean["core"]["kernel"].dtype == dtype
    np.testing.assert_array_equal(mean["scale"], np.ones(3, dtype))


def test_one_tree_is_its_own_mean_and_is_not_changed_by_it():
    given = trees(2)
    before = given[0]["core"]["kernel"].copy()
    np.testing.assert_array_equal(average_trees(given[:1])["core"]["kernel"], before)
    average_trees(given)
    np.testing.assert_array_equal(given[0]["core"]["kernel"], before)


def test_one_tree_is_held_at_a_time():
    class Leaf(np.ndarray):
        """An array to which a weak reference can be made."""

    def generate():
        earlier = None
        for index in range(4):
            assert earlier is None or earlier() is None
            leaf = np.full(3, index, np.float32).view(Leaf)
            earlier = weakref.ref(leaf)
            yield {"a": leaf}
            del leaf

    np.testing.assert_array_equal(average_trees(generate())["a"], np.full(3, 1.5))


def test_integers_must_be_equal():
    one = {"count": np.int32(3), "int8": np.array([1, -2], np.int8), "flag": np.array(True)}
    same = {name: leaf.copy() for name, leaf in one.items()}
    mean = average_trees([one, same])
    for name, leaf in one.items():
        assert mean[name].dtype == leaf.dtype
        np.testing.assert_array_equal(mean[name], leaf)
    with pytest.raises(CheckpointMismatch, match="count has type int32 and other values"):
        average_trees([one, {**same, "count": np.int32(4)}])


def test_other_arrays_are_named():
    one, other = trees(2)
    other["core"]["kernel"] = other["core"]["kernel"][:2]
    with pytest.raises(CheckpointMismatch, match=r"core/kernel: saved \(4, 3\), now \(2, 3\)"):
        average_trees([one, other])
    with pytest.raises(ValueError, match="no tree"):
        average_trees([])
