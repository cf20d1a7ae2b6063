"""Parity with Huginn's own PyTorch model at random weights: values, gradients, bytes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from megatransformer_jax.checkpoints.huginn import (
    HuginnFormatError,
    config_from_huginn,
    load_huginn,
    params_from_huginn,
    params_to_huginn,
)
from megatransformer_jax.losses.cross_entropy import token_loss
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


@pytest.fixture(scope="module")
def reference(huginn_fixture):
    config, params = load_huginn(huginn_fixture)
    params = jax.tree.map(jnp.asarray, params)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    return model, params, np.load(huginn_fixture / "expected.npz")


@pytest.fixture(scope="module")
def forward(reference):
    model, params, expected = reference
    tokens = jnp.asarray(expected["input_ids"], jnp.int32)
    state = jnp.asarray(expected["initial_state"])
    return jax.jit(
        lambda num_steps: model.apply({"params": params}, tokens, num_steps=num_steps, state=state)
    )


@pytest.mark.parametrize("num_steps", [1, 4, 8, 16])
def test_logits_and_latents_agree(forward, reference, num_steps):
    expected = reference[2]
    output = forward(jnp.int32(num_steps))
    np.testing.assert_allclose(output.logits, expected[f"logits_r{num_steps}"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(output.latent, expected[f"latent_r{num_steps}"], rtol=0, atol=2e-5)


def test_loss_and_every_gradient_agree_under_truncated_backprop(reference):
    model, params, expected = reference
    tokens, labels = (jnp.asarray(expected[n], jnp.int32) for n in ("input_ids", "labels"))

    def loss(params):
        output = model.apply(
            {"params": params},
            tokens,
            num_steps=jnp.int32(8),
            backprop_depth=4,
            state=jnp.asarray(expected["initial_state"]),
        )
        sums = token_loss(output.logits, labels, jnp.ones(labels.shape))
        return sums.cross_entropy / sums.tokens

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected["loss_n4_k4"], rtol=1e-6)
    ours = params_to_huginn(jax.device_get(gradients), model.config)
    prefix = "grad_n4_k4/"
    wanted = {name.removeprefix(prefix) for name in expected.files if name.startswith(prefix)}
    assert set(ours) == wanted
    for name in wanted:
        theirs = expected[prefix + name]
        error = np.linalg.norm(ours[name] - theirs) / np.linalg.norm(theirs)
        assert error < 1e-4, (name, error)


def test_parameters_have_the_tree_and_shapes_of_a_fresh_model(reference):
    model, params, _ = reference
    fresh = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, fresh)


def test_import_then_export_gives_the_same_bytes(huginn_fixture, reference):
    model, params, _ = reference
    original = load_file(huginn_fixture / "model.safetensors")
    exported = params_to_huginn(params, model.config)
    assert set(exported) == set(original)
    for name, tensor in original.items():
        assert exported[name].dtype == tensor.dtype
        assert exported[name].tobytes() == tensor.tobytes(), name


def test_grouped_heads_map_both_ways(reference):
    config = config_from_huginn(_values(num_key_value_heads=2, qk_bias=False))
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    params = jax.device_get(init_params(model, jax.random.key(0)))
    tensors = params_to_huginn(params, config)
    assert tensors["transformer.coda.0.attn.Wqkv.weight"].shape == (64 + 2 * 2 * 16, 64)
    jax.tree.map(np.testing.assert_array_equal, params_from_huginn(tensors, config), params)


def test_missing_and_unknown_tensors_are_named(huginn_fixture, reference):
    config = reference[0].config
    tensors = load_file(huginn_fixture / "model.safetensors")
    with pytest.raises(HuginnFormatError, match=r"unknown tensors \['extra'\]"):
        params_from_huginn({**tensors, "extra": np.zeros(1)}, config)
    del tensors["transformer.ln_f.weight"]
    with pytest.raises(HuginnFormatError, match=r"transformer\.ln_f\.weight"):
        params_from_huginn(tensors, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonlin_name": "GELU"}, "nonlin_name is 'GELU'"),
        ({"bias": True}, "bias is True"),
        ({"state_init": "learned"}, "state_init is 'learned'"),
    ],
)
def test_unsupported_values_are_refused(changes, message):
    with pytest.raises(HuginnFormatError, match=message):
        config_from_huginn(_values(**changes))


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_values()))
    with pytest.raises(HuginnFormatError, match=r"model\.safetensors does not exist"):
        load_huginn(tmp_path)


def _values(**changes):
    return {
        "n_embd": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "padded_vocab_size": 256,
        "block_size": 128,
        "tie_embeddings": True,
        "bias": False,
        "qk_bias": True,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 1,
        "n_layers_in_coda": 1,
        "mean_recurrence": 4,
        "mean_backprop_depth": 2,
        "norm_eps": 1e-6,
        "rope_base": 50000,
        "injection_type": "linear",
        "state_init": "like-init",
        **changes,
    }
