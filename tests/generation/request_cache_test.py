"""Sizes of the cache: rounded, large enough, and errors that say what to change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import PLAIN, tiny

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.sampling import CacheConfig, DepthConfig
from megatransformer_jax.generation.request import CachePlan, plan_cache

MODEL = tiny(max_length=4096)


def plan(longest=10, new=20, depth=4, trained_depth=4, model=MODEL, more_rows=0, **cache):
    config = GenerationConfig(
        strategy="greedy",
        max_new_tokens=new,
        depth=DepthConfig(depth=depth),
        cache=CacheConfig(**cache),
    )
    return plan_cache(model, config, trained_depth, longest, new + more_rows, "cpu")


@pytest.mark.parametrize(
    ("longest", "columns"),
    [(1, 16), (16, 16), (17, 32), (33, 64), (256, 256), (257, 512), (512, 512), (513, 768)],
)
def test_prompts_are_padded_so_that_few_sizes_occur(longest, columns):
    assert plan(longest).num_columns == columns


@given(
    longest=st.integers(1, 600),
    new=st.integers(1, 600),
    more=st.integers(0, 8),
    spare=st.none() | st.integers(0, 300),
)
def test_prompt_and_new_rows_always_fit(longest, new, more, spare):
    capacity = None if spare is None else longest + new + more + spare
    sizes = plan(longest, new, more_rows=more, **{"capacity": capacity})
    assert longest <= sizes.num_columns
    assert sizes.num_columns + new + more <= sizes.capacity
    assert sizes.capacity % 64 == 0
    if capacity is not None:  # As asked for, whole blocks apart.
        assert 0 <= sizes.capacity - capacity < 64


def test_a_capacity_that_is_given_holds_exactly_what_it_says():
    # 128 rows are two whole blocks; the prompt's padding gives way.
    assert plan(100, 28, capacity=128) == CachePlan(100, 128, 8)
    with pytest.raises(ConfigError, match=r"cache\.capacity.*127.*100.*28.*raise it to 128"):
        plan(100, 28, capacity=127)
    with pytest.raises(ConfigError, match=r"cache\.capacity.*raise it to 132"):
        plan(100, 28, more_rows=4, capacity=128)


def test_the_models_length_is_the_limit():
    model = tiny(max_length=30)
    assert plan(10, 20, model=model).num_columns == 16
    with pytest.raises(UserError, match=r"11 tokens.*max_new_tokens=20.*max_length=30"):
        plan(11, 20, model=model)


@pytest.mark.parametrize(
    ("depth", "trained_depth", "slots"), [(1, 4, 8), (8, 4, 8), (9, 4, 16), (2, 12, 16)]
)
def test_a_full_cache_has_slots_for_the_depth_and_that_of_training(depth, trained_depth, slots):
    assert plan(depth=depth, trained_depth=trained_depth).num_slots == slots


def test_a_budget_of_slots_is_kept():
    assert plan(depth=4, slots=3).num_slots == 3


def test_a_model_without_a_core_has_a_plan_too():
    assert plan(3, 5, depth=None, trained_depth=None, model=PLAIN) == CachePlan(16, 64, 8)
