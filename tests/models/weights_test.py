"""Weights rounded once to the type of activations, instead of in every pass."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from tiny_model import make, tiny

from megatransformer_jax.models.weights import computed_types, computed_weights
from megatransformer_jax.types import DTypePolicy

BFLOAT16 = DTypePolicy(compute=jnp.dtype(jnp.bfloat16))
# With vectors of several axes, and with matrices that have no axis that a mesh cuts.
CONFIG = tiny(
    attention={"qk_norm": True, "qk_norm_span": "width", "qkv_bias": True, "qk_bias": True},
    value_embedding={"layers": (0, 1), "gate_channels": 4},
    recurrence={"loop_embedding": True, "loop_scale": True, "loop_lora_rank": 2},
    tie_embeddings=False,
)


def test_a_pass_gives_the_same_bits():
    model, params = make(CONFIG)
    model = model.copy(policy=BFLOAT16)
    # Scales that are rounded would show.
    params = jax.tree.map(lambda leaf: leaf * 1.001 + 1e-3, params)
    weights = computed_weights(model, jax.device_get(params))
    tokens = jnp.asarray([[1, 9, 4, 20], [7, 7, 21, 3]])
    run = jax.jit(lambda params: model.apply({"params": params}, tokens, num_steps=3).logits)
    np.testing.assert_array_equal(run(weights), run(params))
    types = jax.tree.map(lambda leaf: leaf.dtype, weights)
    assert types == jax.tree.map(lambda leaf: leaf.dtype, computed_types(model))
    attention = types["core"]["layers"]["layer_0"]["attention"]
    assert attention["qkv"] == attention["qkv_loop_a"] == jnp.bfloat16
    assert attention["qkv_bias"] == attention["query_scale"] == jnp.float32
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(weights))


def test_nothing_changes_where_the_types_are_those_of_passes():
    model, params = make()
    weights = computed_weights(model, params)
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (weights, params))))


def test_on_a_tpu_matrices_lie_in_the_order_of_their_axes():
    model, params = make(CONFIG)

    def reverse(leaf):
        backwards = Layout(tuple(reversed(range(leaf.ndim))))
        return jax.device_put(leaf, Format(backwards, leaf.sharding))

    def orders(tree):
        return {leaf.format.layout.major_to_minor for leaf in jax.tree.leaves(tree)}

    reversed_params = jax.tree.map(reverse, params)
    assert (1, 0) in orders(reversed_params)
    assert orders(computed_weights(model, reversed_params)) == orders(reversed_params)
    weights = computed_weights(model.copy(platform="tpu"), reversed_params)
    assert orders(weights) == {tuple(range(ndim)) for ndim in (1, 2, 3, 4, 5)}
    jax.tree.map(np.testing.assert_array_equal, weights, params)
