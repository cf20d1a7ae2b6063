"""Properties of the whole model, over every architecture option."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import (
    AttentionConfig,
    PeerConfig,
    PositionConfig,
    SharingConfig,
)
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.megatransformer import build_model, init_params, param_axes
from megatransformer_jax.ops.attention import UnsupportedKernelError
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

LENGTH, VOCAB, WIDTH = 10, 24, 16
BASE = ModelConfig(
    vocab_size=VOCAB,
    width=WIDTH,
    max_length=32,
    core_layers=1,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=20),
    recurrence=RecurrenceConfig(state_init="zero"),
)


def variant(**changes):
    """BASE with changes; a dict changes fields of the section of that name."""
    for name, value in changes.items():
        if isinstance(value, dict):
            changes[name] = dataclasses.replace(getattr(BASE, name), **value)
    return dataclasses.replace(BASE, **changes)


VARIANTS = {
    "base": BASE,
    "alibi": variant(positions=PositionConfig(scheme="alibi")),
    "learned": variant(positions=PositionConfig(scheme="learned")),
    "sinusoidal": variant(positions=PositionConfig(scheme="sinusoidal")),
    "no_positions": variant(positions=PositionConfig(scheme="none")),
    "interleaved": variant(positions={"rotary_convention": "interleaved"}),
    "grouped": variant(attention={"num_heads": 4, "num_kv_heads": 2}),
    "multi_query": variant(attention={"num_heads": 4, "num_kv_heads": 1, "head_dim": 6}),
    "biases": variant(
        attention={"qkv_bias": True, "output_bias": True, "qk_bias": True, "qk_norm": True},
        value_embedding={"layers": (0, 2), "gate_channels": 5},
    ),
    "window": variant(attention={"window": 3}),
    "softcaps": variant(attention={"logit_softcap": 5.0}, logit_softcap=3.0),
    "post": variant(norm={"placement": "post"}),
    "sandwich": variant(norm={"placement": "sandwich"}),
    "peri": variant(norm={"placement": "peri"}),
    "layernorm": variant(norm={"kind": "layernorm", "bias": True}),
    "mlp": variant(mlp={"kind": "mlp", "activation": "gelu", "bias": True}),
    "core_width_loop_parameters": variant(
        recurrence={
            "core_width": 24,
            "injection_norm": True,
            "loop_embedding": True,
            "loop_lora_rank": 2,
            "hyper_connections": 2,
            "loop_iterations": 2,
        }
    ),
    "diagonal_readout": variant(
        recurrence={"iteration_norm": True, "adapter": "diagonal", "readout_matrix": True}
    ),
    "untied": variant(tie_embeddings=False, head_bias=True, scale_embeddings=True),
    "plain_lm": dataclasses.replace(BASE, core_layers=0, recurrence=RecurrenceConfig()),
    "core_only": variant(prelude_layers=0, coda_layers=0),
    "state_alone": variant(
        prelude_layers=0,
        coda_layers=0,
        norm={"placement": "peri"},
        recurrence={
            "adapter": "none",
            "state_init": "none",
            "backprop_depth": 8,
            "iteration_norm": True,
            "output_norm": False,
            "head_norm": False,
        },
    ),
    "remat": variant(remat="full"),
    "scanned": variant(
        scan_layers=True,
        core_layers=4,
        coda_layers=0,
        remat="full",
        value_embedding={"layers": (2, 4), "gate_channels": 5},
        recurrence={"loop_scale": True, "loop_lora_rank": 1},
    ),
    "rezero_shared": variant(
        residual="rezero",
        norm={"placement": "none"},
        prelude_layers=3,
        sharing=SharingConfig(scheme="cycle_rev", prelude_unique=2),
    ),
    "peer": variant(
        mlp=MlpConfig(kind="peer", peer=PeerConfig(num_experts=16, num_heads=2, top_k=2, key_dim=4))
    ),
    "admin": variant(residual="admin", norm={"placement": "post"}),
}
RANDOM = np.random.default_rng(0)
TOKENS = jnp.asarray(RANDOM.integers(0, VOCAB, (2, LENGTH)), jnp.int32)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def built(request):
    """(config, parameters, jitted forward) of each variant, compiled once."""
    config = VARIANTS[request.param]
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    # Biases start at 0 and scales at 1; moving them makes a missing one visible.
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    params = tree.unflatten(
        [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    )

    @jax.jit
    def forward(tokens, positions, segment_ids):
        return model.apply(
            {"params": params},
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            num_steps=jnp.int32(3),
        ).logits

    def run(tokens, positions=None, segment_ids=None):
        default = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        ones = jnp.ones_like(tokens)
        return np.asarray(
            forward(
                tokens,
                default if positions is None else positions,
                ones if segment_ids is None else segment_ids,
            )
        )

    return config, params, run


def test_logits_are_finite_float32_and_depend_on_the_input(built):
    config, _, run = built
    logits = run(TOKENS)
    assert logits.shape == (2, LENGTH, VOCAB)
    assert logits.dtype == np.float32
    assert np.all(np.isfinite(logits))
    assert np.abs(logits[0] - logits[1]).max() > 1e-4
    if config.logit_softcap:
        assert np.abs(logits).max() <= config.logit_softcap


def test_the_future_has_no_influence(built):
    run = built[2]
    changed = TOKENS.at[:, 6:].set((TOKENS[:, 6:] + 1) % VOCAB)
    before, after = run(TOKENS), run(changed)
    np.testing.assert_allclose(before[:, :6], after[:, :6], rtol=0, atol=1e-5)
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 1e-3


def test_padding_and_other_documents_have_no_influence(built):
    """Two documents in a row, with padding, equal each document alone."""
    run = built[2]
    first, second = TOKENS[0, :4], TOKENS[1, :5]
    packed = jnp.concatenate([first, second, jnp.zeros(1, jnp.int32)])[None]
    segments = jnp.array([[1] * 4 + [2] * 5 + [0]])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]])
    together = run(packed, positions, segments)
    for document, start in ((first, 0), (second, 4)):
        size = document.shape[0]
        alone = jnp.zeros((1, LENGTH), jnp.int32).at[0, :size].set(document)
        expected = run(alone)[:, :size]
        np.testing.assert_allclose(together[:, start : start + size], expected, rtol=0, atol=2e-5)


def test_every_parameter_has_named_axes(built):
    config, params, _ = built
    axes = param_axes(build_model(config, DTypePolicy(), Sharder(), "cpu"))
    pairs = jax.tree.map(lambda leaf, names: leaf.ndim == len(names), params, axes)
    assert all(jax.tree.leaves(pairs))


def test_every_parameter_has_a_gradient():
    """With all options on, no weight is declared and left unused."""
    config = variant(
        attention={"qkv_bias": True, "output_bias": True, "qk_bias": True, "qk_norm": True},
        norm={"kind": "layernorm", "bias": True, "placement": "sandwich"},
        mlp={"bias": True},
        positions=PositionConfig(scheme="learned"),
        recurrence={
            "core_width": 24,
            "injection_norm": True,
            "iteration_norm": True,
            "readout_matrix": True,
            "loop_embedding": True,
            "loop_scale": True,
            "hyper_connections": 2,
        },
        value_embedding={"layers": (0, 1, 2), "gate_channels": 4},
        tie_embeddings=False,
        head_bias=True,
    )
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    np.testing.assert_array_equal(params["c_matrix"], np.eye(WIDTH))

    def loss(params):
        output = model.apply({"params": params}, TOKENS, num_steps=jnp.int32(3), backprop_depth=2)
        return jnp.sum(jnp.square(output.logits) * jnp.cos(jnp.arange(VOCAB)))

    gradients = jax.jit(jax.grad(loss))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert float(jnp.max(jnp.abs(gradient))) > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["post", "plain_lm"])
@pytest.mark.parametrize("dropout", ["attention", "mlp", "residual", "embedding"])
def test_dropout_of_each_kind_acts_in_training_only(name, dropout):
    config = VARIANTS[name]
    if dropout in ("attention", "mlp"):
        section = dataclasses.replace(getattr(config, dropout), dropout_rate=0.5)
        config = dataclasses.replace(config, **{dropout: section})
    else:
        config = dataclasses.replace(config, **{f"{dropout}_dropout_rate": 0.5})
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    variables = {"params": init_params(model, jax.random.key(0))}

    @jax.jit
    def train(key):
        return model.apply(
            variables, TOKENS, num_steps=2, deterministic=False, rngs={"dropout": key}
        ).logits

    still = jax.jit(lambda: model.apply(variables, TOKENS, num_steps=2).logits)()
    once, twice = train(jax.random.key(1)), train(jax.random.key(1))
    np.testing.assert_array_equal(once, twice)
    assert np.abs(once - still).max() > 1e-3
    assert np.abs(once - train(jax.random.key(2))).max() > 1e-3


def test_remat_changes_neither_values_nor_gradients():
    def gradients(remat, kept_every=1):
        recurrence = dataclasses.replace(BASE.recurrence, kept_every=kept_every)
        config = variant(remat=remat, recurrence=recurrence)
        model = build_model(config, DTypePolicy(), Sharder(), "cpu")
        params = init_params(model, jax.random.key(0))

        def loss(params):
            output = model.apply(
                {"params": params}, TOKENS, num_steps=jnp.int32(4), backprop_depth=4
            )
            return jnp.sum(jnp.sin(output.logits))

        return jax.jit(jax.value_and_grad(loss))(params)

    plain = gradients("none")
    for options in (("full",), ("dots",), ("offload",), ("full", 2)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
            gradients(*options),
            plain,
        )


def test_a_masked_head_is_as_if_its_output_weights_were_zero():
    model = build_model(BASE, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    mask = jnp.ones((3, 2)).at[1, 0].set(0.0)
    masked = model.apply({"params": params}, TOKENS, num_steps=3, head_mask=mask).logits
    output = params["core"]["layers"]["layer_0"]["attention"]["output"]
    params["core"]["layers"]["layer_0"]["attention"]["output"] = output.at[0].set(0.0)
    zeroed = model.apply({"params": params}, TOKENS, num_steps=3).logits
    np.testing.assert_allclose(masked, zeroed, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"must be \(3, 2\)"):
        model.apply({"params": params}, TOKENS, num_steps=3, head_mask=jnp.ones((2, 2)))


def test_bfloat16_policy_keeps_parameters_and_logits_in_float32():
    policy = DTypePolicy.from_precision("auto", "tpu")
    model = build_model(BASE, policy, Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    output = model.apply({"params": params}, TOKENS, num_steps=3)
    assert output.logits.dtype == jnp.float32
    assert output.latent.dtype == jnp.bfloat16
    full = build_model(BASE, DTypePolicy(), Sharder(), "cpu")
    exact = full.apply({"params": params}, TOKENS, num_steps=3).logits
    np.testing.assert_allclose(output.logits, exact, atol=0.04)


def test_a_named_kernel_does_not_stand_in_the_way_of_initialisation():
    """Fused kernels refuse the single token that initialisation runs on."""
    config = variant(attention={"num_heads": 2, "head_dim": 64, "kernel": "splash"})
    model = build_model(config, DTypePolicy(), Sharder(), "tpu")
    assert set(param_axes(model)) == set(init_params(model, jax.random.key(0)))
    tokens = jnp.zeros((1, 12), jnp.int32)
    params = init_params(model, jax.random.key(0))
    with pytest.raises(UnsupportedKernelError, match=r"model\.attention\.kernel='splash'.*T=12"):
        model.apply({"params": params}, tokens, num_steps=1)
