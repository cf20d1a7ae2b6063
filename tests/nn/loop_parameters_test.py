"""What differs between iterations: in every way through the core the same, and neutral at first."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_passes import make, some_tokens, tiny
from flax.traverse_util import flatten_dict, unflatten_dict

from megatransformer_jax.config.recurrence import is_loop_parameter
from megatransformer_jax.evaluation.lens import trace_iterations
from megatransformer_jax.models.adaptation import num_input_axes
from megatransformer_jax.models.core import RecurrentCore
from megatransformer_jax.models.cost.parameter_counts import count_parameters
from megatransformer_jax.models.megatransformer import build_model, init_params, param_axes
from megatransformer_jax.models.passes.observed import open_core
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

OWN = 3
PLAIN = tiny(
    prelude_layers=0,
    core_layers=1,
    coda_layers=0,
    recurrence={"adapter": "sum", "backprop_depth": 6},
    attention={"num_kv_heads": 2},
)
LOOPED = dataclasses.replace(
    PLAIN,
    recurrence=dataclasses.replace(
        PLAIN.recurrence,
        loop_embedding=True,
        loop_scale=True,
        loop_lora_rank=2,
        hyper_connections=2,
        loop_iterations=OWN,
    ),
)
TOKENS = some_tokens(2, 5)


@functools.cache
def made():
    return make(LOOPED)


def of_iteration(params, iteration):
    """Weights of the plain core, and the vector, that stand for one iteration's own."""
    row = min(iteration, OWN - 1)
    flat = flatten_dict(params["core"], sep="/")
    core = {path: leaf for path, leaf in flat.items() if not is_loop_parameter(f"core/{path}")}
    for path in list(core):
        if f"{path}_loop_a" in flat:
            update = jnp.tensordot(flat[f"{path}_loop_a"][row], flat[f"{path}_loop_b"][row], 1)
            core[path] = core[path] + update.reshape(core[path].shape)
        for layer, matrix in (("attention", "attention/output"), ("mlp", "mlp/down")):
            if path.endswith(matrix):
                scale = path.removesuffix(matrix) + f"{layer}_loop_scale"
                core[path] = core[path] * flat[scale][row]
    return unflatten_dict(core, sep="/"), flat["loop_embedding"][row]


@functools.partial(jax.jit, static_argnames="depth")
def reference(params, depth):
    """States after `depth` iterations of a plain core whose weights are those of each."""
    model = made()[0]
    places = jnp.broadcast_to(jnp.arange(5), TOKENS.shape)
    opened = open_core(model, params, TOKENS, positions=places, segment_ids=None)
    plain = RecurrentCore(PLAIN, DTypePolicy(), Sharder(), "cpu", parent=None)
    first, weights = jnp.zeros_like(opened.injected), params["core"]["connections"]
    streams = [first, first]
    for iteration in range(depth):
        core, vector = of_iteration(params, iteration)
        read, mix, write = (
            weights[f"loop_{name}"][min(iteration, OWN - 1)] for name in ("read", "mix", "write")
        )
        before = read[0] * streams[0] + read[1] * streams[1]
        after = plain.apply({"params": core}, before, opened.prepared + vector, opened.context)
        streams = [
            mix[i, 0] * streams[0] + mix[i, 1] * streams[1] + write[i] * (after - before)
            for i in range(2)
        ]
    return jnp.concatenate(streams, axis=-1)


@functools.partial(jax.jit, static_argnames="backprop_depth")
def last_state(params, num_steps, backprop_depth=0):
    arguments = {"num_steps": num_steps, "backprop_depth": backprop_depth}
    sown = made()[0].apply({"params": params}, TOKENS, **arguments, mutable=["last_state"])[1]
    return sown["last_state"]["state"][0]


def test_every_row_and_token_has_its_iterations_own_parameters():
    params = made()[1]
    two, five = reference(params, 2), reference(params, 5)
    np.testing.assert_allclose(last_state(params, jnp.int32(5)), five, atol=1e-5)
    rows = last_state(params, jnp.array([2, 5]))
    np.testing.assert_allclose(rows[0], two[0], atol=1e-5)
    np.testing.assert_allclose(rows[1], five[1], atol=1e-5)
    # Tokens read what others at other iterations offer, so that of a causal row the first counts.
    tokens = last_state(params, jnp.array([[2, 4, 4, 4, 4], [5, 1, 1, 1, 1]]))
    np.testing.assert_allclose(tokens[0, 0], two[0, 0], atol=1e-5)
    np.testing.assert_allclose(tokens[1, 0], five[1, 0], atol=1e-5)


@pytest.mark.parametrize("by_row", [False, True])
def test_every_gradient_is_that_of_the_merged_weights(by_row):
    params = made()[1]
    steps = jnp.array([2, 5]) if by_row else jnp.int32(5)

    def ours(params):
        return jnp.sum(jnp.cos(last_state(params, steps, backprop_depth=6)))

    def wanted(params):
        state = reference(params, 5)
        first = reference(params, 2)[0] if by_row else state[0]
        return jnp.sum(jnp.cos(first)) + jnp.sum(jnp.cos(state[1]))

    gradients = jax.grad(ours)(params)["core"], jax.jit(jax.grad(wanted))(params)["core"]
    for path, theirs in jax.tree_util.tree_leaves_with_path(gradients[1]):
        found = functools.reduce(lambda tree, key: tree[key.key], path, gradients[0])
        assert np.abs(theirs).max() > 0, path
        np.testing.assert_allclose(found, theirs, rtol=2e-3, atol=2e-5, err_msg=str(path))


def test_a_trace_has_the_iterations_in_their_order():
    model, params = made()
    found = trace_iterations(model, params, TOKENS, None, jax.random.key(0), depth=5, top_k=1)
    for depth in (2, 5):
        state, variables = reference(params, depth), {"params": params}
        mean = (state[..., :16] + state[..., 16:]) / 2
        latent = model.apply(variables, mean, method=lambda model, s: model.final_norm(s))
        np.testing.assert_allclose(found.latents[depth - 1], latent, atol=1e-5)


def test_a_fresh_model_is_the_plain_one():
    model = build_model(LOOPED, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    shared = {
        path: leaf
        for path, leaf in flatten_dict(params, sep="/").items()
        if not is_loop_parameter(path)
    }
    plain = build_model(PLAIN, DTypePolicy(), Sharder(), "cpu")
    arguments = {"num_steps": 5, "mutable": ["last_state"]}
    _, sown = plain.apply({"params": unflatten_dict(shared, sep="/")}, TOKENS, **arguments)
    # Each of the streams is the plain model's state.
    wanted = jnp.tile(sown["last_state"]["state"][0], (1, 1, 2))
    np.testing.assert_allclose(last_state(params, jnp.int32(5)), wanted, atol=1e-6)
    counts = count_parameters(params)
    # Two scales, updates of four matrices, a vector, and the streams' weights, for each of three.
    assert sum(counts["loop_parameters"].values()) == 3 * (2 + 2 * 184 + 16 + 2 + 4 + 2)
    axes = flatten_dict(param_axes(model), sep="/")
    assert axes["core/layers/layer_0/mlp/up_loop_b"] == (None, None, None, "mlp")
    assert axes["core/layers/layer_0/attention/output_loop_a"] == (None, "heads", None)
    # Neither int8 storage nor LoRA takes it for a matrix.
    assert num_input_axes(axes["core/layers/layer_0/mlp/down_loop_b"]) is None


def test_an_iteration_without_a_number_is_an_error():
    model, params = made()
    places = jnp.broadcast_to(jnp.arange(5), TOKENS.shape)
    opened = open_core(model, params, TOKENS, positions=places, segment_ids=None)
    with pytest.raises(ValueError, match="iterations differ; give the number"):
        opened.core.apply(
            {"params": opened.params}, opened.injected, opened.prepared, opened.context
        )
