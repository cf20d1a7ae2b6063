"""Huginn's tensors and our parameters are the same numbers in other places."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from huginn_values import HUGINN, huginn_values, small_huginn

from megatransformer_jax.checkpoints.huginn import rotary_table
from megatransformer_jax.checkpoints.tensor_map import (
    FormatError,
    iterate_tensors,
    params_from_tensors,
    tensor_shapes,
)
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.ops.positions import rotary_table as our_rotary_table
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


def params_to_huginn(params, config):
    return dict(iterate_tensors(params, HUGINN.links(config)))


def params_from_huginn(tensors, config, place=lambda path, tensor: tensor):
    return params_from_tensors(tensors, HUGINN.links(config), HUGINN.extras(config, tensors), place)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "qk_bias": False}], ids=str)
def test_both_ways_give_the_same_parameters(changes):
    config, params = small_huginn(**changes)
    tensors = params_to_huginn(params, config)
    assert {name: tensor.shape for name, tensor in tensors.items()} == tensor_shapes(
        HUGINN.links(config)
    )
    jax.tree.map(np.testing.assert_array_equal, params_from_huginn(tensors, config), params)


def test_grouped_heads_have_fewer_rows():
    config, params = small_huginn(num_key_value_heads=2, qk_bias=False)
    tensors = params_to_huginn(params, config)
    assert tensors["transformer.coda.0.attn.Wqkv.weight"].shape == (32 + 2 * 2 * 8, 32)


def test_the_tree_is_that_of_a_fresh_model():
    config, params = small_huginn()
    loaded = params_from_huginn(params_to_huginn(params, config), config)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    fresh = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(lambda leaf: leaf.shape, fresh)


def test_each_parameter_is_placed_once_and_in_its_type():
    config, params = small_huginn()
    short = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    placed = []
    result = params_from_huginn(
        params_to_huginn(short, config),
        config,
        lambda path, tensor: placed.append((path, tensor)) or "here",
    )
    assert set(jax.tree.leaves(result)) == {"here"}
    assert len(placed) == len(jax.tree.leaves(params))
    flat = flatten_dict(short, sep="/")
    assert {path: tensor.shape for path, tensor in placed} == {
        path: leaf.shape for path, leaf in flat.items()
    }
    assert {tensor.dtype for _, tensor in placed} == {np.dtype(ml_dtypes.bfloat16)}


def test_missing_unknown_and_misshapen_tensors_are_named():
    config, params = small_huginn()
    tensors = params_to_huginn(params, config)
    with pytest.raises(FormatError, match=r"unknown tensors extra; this config has no use"):
        params_from_huginn({**tensors, "extra": np.zeros(1)}, config)
    shorter = {name: t for name, t in tensors.items() if "ln_f" not in name}
    with pytest.raises(FormatError, match=r"missing: transformer\.ln_f\.weight;"):
        params_from_huginn(shorter, config)
    with pytest.raises(FormatError, match=r"ln_f\.weight is \(3,\), not \(32,\)"):
        params_from_huginn({**tensors, "transformer.ln_f.weight": np.zeros(3)}, config)
    deeper = HUGINN.read_config(huginn_values(n_layers_in_coda=2))
    with pytest.raises(FormatError, match=r"missing: transformer\.coda\.1\..* and 1 more;"):
        params_from_huginn(tensors, deeper)


def test_a_head_that_is_the_embedding_may_be_there():
    config, params = small_huginn()
    tensors = params_to_huginn(params, config)
    head = tensors["transformer.wte.weight"]
    loaded = params_from_huginn({**tensors, "lm_head.weight": head}, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(FormatError, match=r"'lm_head\.weight' is not equal to"):
        params_from_huginn({**tensors, "lm_head.weight": head + 1}, config)


def test_the_table_of_rotations_is_ours():
    config, _ = small_huginn()
    table = rotary_table(config)
    assert table.shape == (1, 128, 1, 4, 2) and table.dtype == np.float32
    ours = our_rotary_table(jax.numpy.arange(128)[None], 8, config.positions.rotary_base)
    for number, part in enumerate(ours):
        np.testing.assert_allclose(np.asarray(part).reshape(128, 4), table[0, :, 0, :, number],
                                   atol=1e-4)  # fmt: skip


def test_a_table_of_rotations_may_be_there_if_it_is_the_configs():
    config, params = small_huginn()
    tensors = params_to_huginn(params, config)
    table = rotary_table(config)
    for right in (table, table.astype(ml_dtypes.bfloat16)):
        loaded = params_from_huginn({**tensors, "freqs_cis": right}, config)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    other = rotary_table(HUGINN.read_config(huginn_values(rope_base=10000)))
    for wrong in (other, table[:, :-1]):
        with pytest.raises(FormatError, match=r"'freqs_cis' is .* and not the table of rotation"):
            params_from_huginn({**tensors, "freqs_cis": wrong}, config)
