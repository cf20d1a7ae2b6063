"""The networks that draw images: the time is used, shapes of all sizes, types, checked sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.config.decoders import DitConfig, UNetConfig
from megatransformer_jax.nn.dit import Dit, grid_embedding
from megatransformer_jax.nn.unet import UNet
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

UNET = UNetConfig(
    base_width=4, width_multipliers=(1,), attention_levels=(), norm_groups=2, head_width=2
)
DIT = DitConfig(width=8, num_layers=1, num_heads=2, hidden_width=8)


def network_of(kind, policy=None, **changes):
    policy = policy or DTypePolicy()
    if kind == "unet":
        return UNet(UNetConfig(**changes) if changes else UNET, policy)
    return Dit(DitConfig(**changes) if changes else DIT, policy, Sharder(), "cpu")


def inputs(shape, count=2):
    images = jax.random.normal(jax.random.key(0), (count, *shape))
    return (
        images,
        jnp.array([0.2, 0.7])[:count],
        jnp.ones((count, 2, 5)),
        jnp.ones((count, 2), bool),
    )


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_output_changes_with_the_time(kind):
    network, (images, _, *condition) = network_of(kind), inputs((4, 4, 1), 1)
    boxed = jax.eval_shape(network.init, jax.random.key(1), images, jnp.ones(1), *condition)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), nn.meta.unbox(boxed)
    )
    apply = jax.jit(lambda variables, time: network.apply(variables, images, time, *condition))
    outputs = [np.asarray(apply(variables, jnp.full(1, time))) for time in (0.2, 0.201, 0.9)]
    assert np.max(np.abs(outputs[0] - outputs[1])) > 1e-5
    assert np.max(np.abs(outputs[0] - outputs[2])) > 1e-2
    if kind == "dit":
        return
    # The time acts in every residual block, not only where it enters.
    params = variables["params"]
    blocks = [name for name in params if name.endswith(("_block", "_block_0", "_block_1"))]
    assert len(blocks) == 5
    for name in blocks:
        changed = dict(params)
        changed[name] = dict(
            params[name], modulation=jax.tree.map(np.zeros_like, params[name]["modulation"])
        )
        assert np.max(np.abs(apply({"params": changed}, jnp.full(1, 0.2)) - outputs[0])) > 1e-4


@pytest.mark.parametrize(
    ("kind", "shape", "changes"),
    [
        ("unet", (64, 64, 3), {"width_multipliers": (1, 2, 2, 4), "attention_levels": (2, 3)}),
        ("unet", (8, 16, 1), {"blocks_per_level": 2}),
        ("dit", (8, 8, 1), {}),
        ("dit", (64, 32, 3), {"patch_size": 4}),
    ],
)
def test_shapes_and_types(kind, shape, changes):
    network = network_of(kind, DTypePolicy(compute=jnp.dtype("bfloat16")), **changes)

    def run(key):
        output, variables = network.init_with_output(key, *inputs(shape))
        return output, nn.meta.unbox(variables)

    output, variables = jax.eval_shape(run, jax.random.key(0))
    assert output.shape == (2, *shape)
    assert output.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_attention_is_where_the_config_says():
    network = network_of(
        "unet", width_multipliers=(1, 2, 2), attention_levels=(1,), blocks_per_level=1
    )
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs((8, 8, 1)))["params"]
    assert {name for name in params if "attention" in name} == {
        "down_1_0_attention",
        "middle_attention",
        "up_1_0_attention",
        "up_1_1_attention",
    }


def test_sides_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"6x8 cannot be halved .* multiples of 4"):
        network = network_of("unet", width_multipliers=(1, 2, 2))
        jax.eval_shape(network.init, jax.random.key(0), *inputs((6, 8, 1)))
    with pytest.raises(ValueError, match="5x8 is not filled by patches of 2x2"):
        jax.eval_shape(network_of("dit").init, jax.random.key(0), *inputs((5, 8, 1)))


def test_places_are_sinusoids_of_row_and_column():
    table = np.asarray(grid_embedding(2, 3, 8))[0]
    rate = 10_000.0**-0.5
    for row, column in np.ndindex(2, 3):
        wanted = [
            f(place * w) for place in (row, column) for w in (1.0, rate) for f in (np.sin, np.cos)
        ]
        np.testing.assert_allclose(table[3 * row + column], wanted, atol=1e-6)
    with pytest.raises(ValueError, match="width is 6"):
        grid_embedding(2, 2, 6)
