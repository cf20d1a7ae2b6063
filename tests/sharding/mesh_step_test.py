"""Sharded training steps equal the single-device one, and gather the core's weights once."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hlo import count_in_loops, reduced_numbers
from sharded_step import MESHES, assert_equal_steps, run_config, sharded

from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder


@pytest.mark.parametrize("mesh_name", MESHES)
def test_a_sharded_step_equals_the_single_device_one(mesh_name):
    assert_equal_steps(run_config(), mesh_name)


def test_draws_per_token_and_accumulation_shard_too():
    assert_equal_steps(run_config(draw_per="token", accumulation=2), "sequence")


def test_the_implicit_gradient_shards_too():
    config = run_config(draw_per="sequence")
    recurrence = dataclasses.replace(
        config.model.recurrence, gradient="implicit", implicit_tolerance=0.1
    )
    model = dataclasses.replace(config.model, recurrence=recurrence)
    config = dataclasses.replace(config, model=model)
    assert_equal_steps(config, "tensor")
    text, *_, metrics = sharded(config, "tensor")
    assert 1 < metrics["implicit_iterations"] < 8 and metrics["implicit_residual"] > 0
    assert count_in_loops(text, "all-gather")[0] == 0  # Neither to settle nor to add terms.


@pytest.mark.parametrize(
    ("mesh_name", "fsdp", "kept_every"),
    [("data and tensor", 1, 1), ("tensor", 2, 1), ("data and tensor", 1, 2)],
)
def test_gradients_in_loops_are_summed_over_data_once(mesh_name, fsdp, kept_every):
    """Of micro-batches, and of groups of iterations that are computed again together."""
    config = run_config(accumulation=2 // kept_every)
    if kept_every > 1:
        recurrence = dataclasses.replace(
            config.model.recurrence, backprop_depth=4, kept_every=kept_every
        )
        model = dataclasses.replace(config.model, recurrence=recurrence, remat="full")
        config = dataclasses.replace(config, model=model)
    assert_equal_steps(config, mesh_name)
    text = sharded(config, mesh_name)[0]
    in_loops, outside = reduced_numbers(text)
    up = (
        16 * 2 * 24 // 2 // fsdp
    )  # A device's part of the largest matrix; nothing else is as large.
    assert up in outside and up not in in_loops


def test_the_step_moves_every_parameter_matrix():
    """Else equal parameters after the step would prove nothing."""
    _, before, after, _ = sharded(run_config(), "fsdp")
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), before.params, after.params)
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_parameters_are_cut_by_the_rules_table():
    _, state, _, _ = sharded(run_config(), "tensor")
    qkv = state.params["core"]["layers"]["layer_0"]["attention"]["qkv"]
    assert qkv.shape == (16, 2, 4, 4)
    assert qkv.addressable_shards[0].data.shape == (8, 1, 4, 4)


def test_core_weights_are_gathered_before_the_loop_and_not_inside():
    text = sharded(run_config(), "fsdp")[0]
    in_loops, total = count_in_loops(text, "all-gather")
    assert total > 0, "with fsdp, weights must be gathered somewhere"
    assert in_loops == 0


def test_the_check_notices_a_gather_inside_a_loop():
    """A weight that changes in each iteration must be gathered in each, and is counted."""
    mesh = make_mesh(MESHES["fsdp"], jax.devices())
    sharder = Sharder(mesh)
    weight = jax.device_put(jnp.eye(16), sharder.sharding("embed", None))

    @jax.jit
    def loop(weight, x):
        def body(_, carry):
            weight, x = carry
            x = jnp.tanh(x @ sharder.gather_params(weight, ("embed", None)))
            return sharder.constrain(weight * 0.9, "embed", None), x

        return jax.lax.fori_loop(0, 3, body, (weight, x))

    in_loops, total = count_in_loops(
        loop.lower(weight, jnp.ones((8, 16))).compile().as_text(), "all-gather"
    )
    assert in_loops > 0
    assert in_loops <= total
