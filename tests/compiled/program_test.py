import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tpu_programs import looping

from megatransformer_jax.compiled.chips import CHIPS
from megatransformer_jax.compiled.hlo import parse_hlo
from megatransformer_jax.compiled.program import read_program
from megatransformer_jax.config.option import UserError

V4 = CHIPS["v4"]
FLOATS = 8 * 128 * 4  # Bytes of a device's rows.


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))


def _compile(function, *shapes, **options):
    return jax.jit(function, **options).lower(*shapes).compile()


def _floats(*dims, sharding=None):
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)


def _exchanges(x, bound):
    """An all-reduce, then three gathers and scatters, then as many permutes as is said."""
    y = jax.lax.psum(x, "tensor")

    def turn(y, _):
        whole = jax.lax.all_gather(y, "data", axis=0, tiled=True)
        return jax.lax.psum_scatter(whole, "data", scatter_dimension=0, tiled=True) / 2, None

    def pass_on(state):
        ring = [(place, (place + 1) % 4) for place in range(4)]
        return state[0] + 1, jax.lax.ppermute(state[1], "tensor", ring)

    y, _ = jax.lax.scan(turn, y, length=3)
    return jax.lax.while_loop(lambda state: state[0] < bound, pass_on, (0, y))[1]


def test_exchanges_in_and_outside_of_loops(mesh):
    rows = P("data", None)
    mapped = jax.shard_map(
        _exchanges, mesh=mesh, in_specs=(rows, P()), out_specs=rows, check_vma=False
    )
    compiled = _compile(mapped, _floats(16, 128), jax.ShapeDtypeStruct((), jnp.int32))
    reading = read_program(compiled.as_text(), mesh.shape, V4, traced_trips={"shard_map/while": 5})
    scan, ring = reading.loops
    assert [(loop.trips, loop.trips_are, loop.turns) for loop in reading.loops] == [
        (3, "known", 3),
        (5, "given", 5),
    ]
    found = [
        (item.kind, item.axes, item.loop, item.times, item.wire_bytes)
        for item in reading.collectives
    ]
    assert found == [
        ("all-reduce", ("tensor",), None, 1, 2 * 3 / 4 * FLOATS),
        ("all-gather", ("data",), scan.name, 3, FLOATS),
        ("reduce-scatter", ("data",), scan.name, 3, FLOATS),
        ("collective-permute", ("tensor",), ring.name, 5, FLOATS),
    ]
    assert reading.wire_bytes == (1.5 + 3 + 3 + 5) * FLOATS
    assert reading.estimate.exchange_s == reading.wire_bytes / V4.ici_bandwidth
    # Two axes at once; each has 6 or 6.5 of these.
    assert reading.estimate.floor_s == pytest.approx(6.5 * FLOATS / V4.ici_bandwidth)
    assert reading.flags == ()
    assert json.loads(json.dumps(reading.to_dict()))["wire_bytes"] == reading.wire_bytes


def test_without_loops_the_counts_are_those_of_xla():
    def step(params, x, y):
        def loss(params):
            for weight in params:
                x_out = jnp.tanh((x if weight is params[0] else x_out) @ weight)
            return jnp.sum((x_out - y) ** 2)

        return jax.tree.map(jnp.subtract, params, jax.grad(loss)(params))

    compiled = _compile(
        step,
        [_floats(64, 256), _floats(256, 32)],
        _floats(128, 64),
        _floats(128, 32),
        donate_argnums=0,
    )
    reading = read_program(compiled.as_text(), {"data": 1}, V4)
    counted, memory = compiled.cost_analysis(), compiled.memory_analysis()
    # Forward, and backward to both matrices and the layer between them.
    products = 2 * 128 * (2 * 64 * 256 + 3 * 256 * 32)
    assert reading.flops == reading.flops_once == products
    assert reading.flops == pytest.approx(counted["flops"], rel=0.02)  # It counts tanh as well.
    assert reading.hbm_bytes == pytest.approx(counted["bytes accessed"], rel=0.02)
    assert reading.live_bytes == pytest.approx(memory.temp_size_in_bytes, rel=0.02)
    assert reading.buffers[0].num_bytes == 128 * 256 * 4
    # It moves more than it computes.
    assert reading.estimate.floor_s == reading.hbm_bytes / V4.hbm_bandwidth
    slow = read_program(compiled.as_text(), {"data": 1}, dataclasses.replace(V4, bf16_flops=1e9))
    assert slow.estimate.floor_s == products / 1e9
    estimate = reading.estimate
    assert estimate.no_overlap_s == estimate.compute_s + estimate.memory_s
    assert estimate.utilisation(products, V4) == pytest.approx(
        products / V4.bf16_flops / estimate.no_overlap_s
    )


def test_gradients_that_the_partitioner_reduces_in_the_loop_are_seen(mesh):
    """The compiler of CPUs does that to a loop that uses the same weight in every turn."""

    def step(params, x):
        def loss(params):
            turn = lambda x, _: (jnp.tanh(x @ params["core"]), None)  # noqa: E731
            return jnp.sum(jax.lax.scan(turn, x, length=3)[0] ** 2)

        return jax.grad(loss)(params)

    whole = NamedSharding(mesh, P())
    compiled = _compile(
        step,
        {"core": _floats(64, 64, sharding=whole)},
        _floats(32, 64, sharding=NamedSharding(mesh, P(("data", "tensor"), None))),
        out_shardings={"core": whole},
    )
    reading = read_program(compiled.as_text(), mesh.shape, V4)
    (flag,) = reading.flags
    assert (flag.kind, flag.num_bytes) == ("gradient-in-loop", 3 * 2 * 7 / 8 * 64 * 64 * 4)
    (reduced,) = reading.collectives
    assert (reduced.axes, reduced.times) == (("data", "tensor"), 3)


def test_turns_that_are_given():
    product = "%y = bf16[64,256]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf"
    weight = "%w = bf16[256,256]{1,0:T(8,128)(2,1)} constant({...})\n  "
    module = parse_hlo(looping(weight + product, bound="bound.2"))
    once = 2 * 64 * 256 * 256
    counts = {"other": 9, "core/while": 4}, {"core": 2, "while": 3}, 6, {"other": 9}
    readings = [read_program(module, {"data": 1}, V4, traced_trips=trips) for trips in counts]
    assert [reading.flops for reading in readings] == [4 * once, 2 * once, 6 * once, once]
    assert [reading.loops[0].trips_are for reading in readings] == [*["given"] * 3, "assumed"]
    assert readings[0].flops_once == once
    assert readings[0].loop("body").flops == once
    assert readings[0].hbm_bytes_outside_loops == 2 * 4  # A copy of the bound.
    with pytest.raises(KeyError):
        readings[0].loop("other")
    with pytest.raises(UserError, match=r"traced_trips: \{'core': -1\} has a negative number"):
        read_program(module, {"data": 1}, V4, traced_trips={"core": -1})


def test_of_a_conditional_the_longest_branch_counts():
    def choose(which, x):
        branches = [jnp.tanh, lambda x: x @ x, lambda x: x @ x @ x]
        return jax.lax.switch(which, branches, x)

    compiled = _compile(choose, jax.ShapeDtypeStruct((), jnp.int32), _floats(128, 128))
    reading = read_program(compiled.as_text(), {"data": 1}, V4)
    assert reading.flops == 2 * 2 * 128**3
