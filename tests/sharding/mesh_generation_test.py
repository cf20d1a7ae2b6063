"""Generation on a mesh gives what one device gives, with everything cut as it should be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import count_in_loops
from jax.sharding import PartitionSpec
from tiny_mesh import CAPACITY, DEPTH, MESHES, model_and_params

from megatransformer_jax.config.generation import (
    GenerationConfig,
    ParallelConfig,
    SpeculativeConfig,
)
from megatransformer_jax.generation.decode_loop import DecodeSettings, decode, start
from megatransformer_jax.generation.endings import Ending
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.placement import (
    empty_cache,
    fetch,
    for_rows,
    put_rows,
    replicate,
)
from megatransformer_jax.generation.prefill import left_padded, prefill
from megatransformer_jax.generation.processors.cuts import Temperature
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.nn.kv_cache import CacheShape

ROWS, NUM_NEW = 8, 6
ROW_CUT, HEAD_CUT = ("data", "fsdp"), "tensor"


@dataclasses.dataclass(frozen=True)
class Run:
    logits: np.ndarray
    tokens: np.ndarray
    steps: np.ndarray
    scores: np.ndarray
    cache: object
    text: str


@functools.cache
def run(mesh_name):
    """Rows that are greedy and rows that draw, of unequal length, that leave the core early."""
    model, params = model_and_params(mesh_name)
    model = for_rows(model, ROWS)
    sharder = model.sharder
    prompts = [list(range(1, 2 + row % 3 * 4)) for row in range(ROWS)]
    history = put_rows(sharder, history_of_prompts(prompts, CAPACITY, pad_id=0))
    criterion = exit_criterion("latent_diff")
    numbers = jnp.int32(DEPTH), jnp.float32(1.0), jnp.int32(2)
    rule = replicate(sharder, DepthRule(*numbers, criterion))
    ending = replicate(sharder, Ending(jnp.asarray([3], jnp.int32), jnp.int32(NUM_NEW)))
    keys = put_rows(sharder, jax.random.split(jax.random.key(1), ROWS))
    cache = empty_cache(
        sharder, model.config, CacheShape(ROWS, CAPACITY, DEPTH, jnp.dtype("float32"), "cpu")
    )
    prefilled = prefill(model, params, left_padded(history, keys, 16), cache, rule)
    temperatures = put_rows(sharder, jnp.asarray([0.0, 1.0] * (ROWS // 2)))
    chain = (Temperature(temperatures),)
    settings = DecodeSettings(rule, chain, ending, keys, is_drawn=True, sharder=sharder)
    state = start(settings, prefilled, history)
    # As plain leaves: JAX's description of arguments is none of the arrays that the types ask for.
    arguments = (params, settings, state, replicate(sharder, jnp.int32(NUM_NEW)))
    leaves, tree = jax.tree.flatten(arguments)
    decode_leaves = jax.jit(lambda leaves: decode(model, *tree.unflatten(leaves)))
    compiled = decode_leaves.lower(leaves).compile()
    state = compiled(leaves)
    arrays = (prefilled.logits, state.history.tokens, state.steps, state.scores)
    return Run(*fetch(sharder, arrays), state.cache, compiled.as_text())


@pytest.mark.parametrize("mesh_name", MESHES)
def test_tokens_steps_and_scores_equal_those_of_one_device(mesh_name):
    ours, wanted = run(mesh_name), run(None)
    np.testing.assert_allclose(ours.logits, wanted.logits, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours.tokens, wanted.tokens)
    np.testing.assert_array_equal(ours.steps, wanted.steps)
    np.testing.assert_allclose(ours.scores, wanted.scores, rtol=0, atol=1e-4)


def test_the_rows_differ_and_leave_the_core_at_different_depths():
    """Else the comparison would prove little."""
    result = run(None)
    assert len({tuple(row) for row in result.tokens}) == ROWS
    assert set(result.steps[result.steps > 0].tolist()) >= {2, 3, 4}


@pytest.mark.parametrize("mesh_name", MESHES)
def test_the_cache_stays_cut_over_rows_and_heads(mesh_name):
    cache = run(mesh_name).cache
    ways = {"data": (8, 1), "fsdp": (8, 1), "tensor": (4, 2)}[mesh_name]
    for array in jax.tree.leaves((cache.prelude, cache.core, cache.coda)):
        entries, rows, heads, *rest = array.shape
        local = (entries, rows // ways[0], heads // ways[1], *rest)
        assert {shard.data.shape for shard in array.addressable_shards} == {local}
    for array in (cache.positions, cache.num_steps, cache.next_position):
        assert array.addressable_shards[0].data.shape == (ROWS // ways[0], *array.shape[1:])


@pytest.mark.parametrize("mesh_name", MESHES)
def test_nothing_is_gathered_in_the_loops_but_scores_of_a_cut_vocabulary(mesh_name):
    in_loops, total = count_in_loops(run(mesh_name).text, "all-gather")
    assert in_loops == (1 if mesh_name == "tensor" else 0)
    assert (total > in_loops) == (mesh_name != "data"), "with fsdp, weights are gathered before"
    for operation in ("all-to-all", "collective-permute"):
        assert count_in_loops(run(mesh_name).text, operation) == (0, 0)


def completions(mesh_name, prompts, **options):
    model, params = model_and_params(mesh_name)
    generator = Generator(model, params, None, GenerationConfig(**options), DEPTH)
    return [(text.token_ids, text.depths) for text in generator.generate(prompts)]


def test_texts_do_not_depend_on_the_mesh_nor_on_what_fills_a_batch_up():
    """Three prompts are filled up to four, of which each device gets the two texts of one."""
    prompts, options = [[1, 2, 3], [4], [5, 6]], {"num_samples": 2, "max_new_tokens": 4}
    assert completions("tensor", prompts, **options) == completions(None, prompts, **options)


@pytest.mark.parametrize("strategy", ["speculative", "parallel"])
def test_strategies_that_accept_rows_one_by_one_do_not_depend_on_the_mesh(strategy):
    """Beam search has its own test."""
    numbers = {
        "speculative": SpeculativeConfig(draft_depth=1, draft_length=2),
        "parallel": ParallelConfig(iterations_per_round=2, max_wavefront=2),
    }
    options = {"strategy": strategy, "max_new_tokens": 4, strategy: numbers[strategy]}
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    assert completions("tensor", prompts, **options) == completions(None, prompts, **options)


def test_a_text_alone_is_not_cut_and_can_be_streamed():
    options = {"strategy": "greedy", "max_new_tokens": 3}
    model, params = model_and_params("fsdp")
    generator = Generator(model, params, None, GenerationConfig(**options), DEPTH)
    streamed = [token.token_id for token in generator.stream([7, 8, 9])]
    assert tuple(streamed) == completions(None, [[7, 8, 9]], **options)[0][0]
    rules = for_rows(model, 1).sharder.rules
    assert rules.spec("batch", "length", "kv_heads") == PartitionSpec(None, None, HEAD_CUT)
    rules = for_rows(model, ROWS).sharder.rules
    assert rules.spec("batch", "length", "kv_heads") == PartitionSpec(ROW_CUT, None, HEAD_CUT)
