"""A plain model as a recurrent one: which layers go where, and that it computes the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.build import construct, to_dict
from megatransformer_jax.config.build import plain as plain_values
from megatransformer_jax.config.layers import AttentionConfig, SharingConfig, ValueEmbeddingConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.losses.tokens import token_loss
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.retrofit import (
    plan_retrofit,
    retrofit_options,
    retrofit_params,
)
from megatransformer_jax.nn.adapters import build_adapter
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

PLAIN = ModelConfig(
    vocab_size=24,
    width=16,
    max_length=8,
    prelude_layers=2,
    core_layers=0,
    coda_layers=1,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=12),
)
TOKENS = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)


def recurrent(prelude=1, core=1, coda=1, **recurrence):
    options = {"state_init": "zero", "output_norm": False, **recurrence}
    return dataclasses.replace(
        PLAIN,
        prelude_layers=prelude,
        core_layers=core,
        coda_layers=coda,
        recurrence=RecurrenceConfig(**options),
    )


def deep(layers):
    return dataclasses.replace(PLAIN, prelude_layers=layers - 2, coda_layers=2)


def build(config):
    return build_model(config, DTypePolicy(), Sharder(), "cpu")


@pytest.fixture(scope="module")
def plain():
    model = build(PLAIN)
    params = init_params(model, jax.random.key(0))
    return params, model.apply({"params": params}, TOKENS, num_steps=0).logits


def retrofitted(config, params):
    model = build(config)
    plan = plan_retrofit(PLAIN, config, None)
    fresh = init_params(model, jax.random.key(1))
    return model, retrofit_params(PLAIN, params, config, fresh, plan)


def test_one_iteration_with_all_layers_is_the_plain_model(plain):
    params, expected = plain
    model, ours = retrofitted(recurrent(), params)
    forward = jax.jit(lambda steps: model.apply({"params": ours}, TOKENS, num_steps=steps).logits)
    once = forward(1)
    # Two programs of the same formulas: equal up to the last bit.
    np.testing.assert_allclose(once, expected, rtol=0, atol=1e-6)
    # The state does not count yet, so depth changes nothing at all.
    np.testing.assert_array_equal(forward(3), once)


@pytest.mark.parametrize(
    "recurrence", [{"adapter": "diagonal", "zero_order_hold": True}, {"adapter": "sum"}]
)
def test_other_adapters_pass_the_injection_on_once(plain, recurrence):
    config = recurrent(**recurrence)
    params, _ = plain
    _, ours = retrofitted(config, params)
    adapter = {"params": ours["core"].get("adapter", {})}
    module = build_adapter(config, weight_init(config, 16), DTypePolicy())
    embedding = jax.random.normal(jax.random.key(2), (1, 4, 16))
    prepared = module.apply(adapter, embedding, method="prepare")
    first = module.apply(adapter, jnp.zeros_like(embedding), prepared)
    np.testing.assert_allclose(first, embedding, rtol=0, atol=1e-6)
    later = module.apply(adapter, embedding, prepared)
    assert float(jnp.max(jnp.abs(later - embedding))) > 0.1


def test_the_norm_of_the_last_state_is_an_option(plain):
    params, expected = plain
    model, ours = retrofitted(recurrent(output_norm=True), params)
    logits = model.apply({"params": ours}, TOKENS, num_steps=1).logits
    assert float(jnp.max(jnp.abs(logits - expected))) > 1e-3


def test_the_state_kernel_learns_although_it_starts_at_zero(plain):
    params, _ = plain
    model, ours = retrofitted(recurrent(), params)

    def loss(kernel):
        adapter = {**ours["core"]["adapter"], "state_kernel": kernel}
        tree = {**ours, "core": {**ours["core"], "adapter": adapter}}
        output = model.apply({"params": tree}, TOKENS, num_steps=2, backprop_depth=2)
        return jnp.mean(jnp.square(output.logits))

    gradient = jax.jit(jax.grad(loss))(ours["core"]["adapter"]["state_kernel"])
    assert float(jnp.max(jnp.abs(gradient))) > 1e-4


def test_layers_come_from_where_the_plan_says(plain):
    params, _ = plain
    # The core from layer 1, the coda from the source's coda.
    _, ours = retrofitted(recurrent(prelude=1, core=1, coda=1), params)
    pairs = (
        (ours["prelude"]["layer_0"], params["prelude"]["layer_0"]),
        (ours["core"]["layers"]["layer_0"], params["prelude"]["layer_1"]),
        (ours["coda"]["layer_0"], params["coda"]["layer_0"]),
        (ours["embedding"], params["embedding"]),
    )
    for here, there in pairs:
        jax.tree.map(np.testing.assert_array_equal, here, there)
    assert set(ours["prelude"]) == {"layer_0"}


@pytest.mark.parametrize(
    ("start", "core", "dropped"),
    [(None, (4, 5, 6), (2, 3)), (2, (2, 3, 4), (5, 6)), (3, (3, 4, 5), (2, 6))],
)
def test_the_plan(start, core, dropped):
    plan = plan_retrofit(deep(8), recurrent(2, 3, 1), start)
    assert (plan.prelude, plan.core, plan.coda) == ((0, 1), core, (7,))
    assert plan.dropped == dropped


def test_plans_that_cannot_be_are_refused():
    for start in (1, 5):
        with pytest.raises(ConfigError, match=rf"core_start: {start}: .* at 2 or later and at 4"):
            plan_retrofit(deep(8), recurrent(2, 3, 1), start)
    with pytest.raises(ConfigError, match=r"fine_tuning\.retrofit: .* more than the 5 layers"):
        plan_retrofit(deep(5), recurrent(2, 3, 1), None)
    with pytest.raises(ConfigError, match=r"needs a plain model, .* core_layers=1"):
        plan_retrofit(recurrent(), recurrent(), None)
    shared = dataclasses.replace(deep(8), sharing=SharingConfig(scheme="cycle", prelude_unique=2))
    with pytest.raises(ConfigError, match=r"init_from has sharing\.scheme='cycle'"):
        plan_retrofit(shared, recurrent(2, 3, 1), None)
    target = dataclasses.replace(
        recurrent(2, 3, 1), sharing=SharingConfig(scheme="cycle", core_unique=2)
    )
    with pytest.raises(ConfigError, match=r"this one has sharing\.scheme='cycle'"):
        plan_retrofit(deep(8), target, None)
    numbered = dataclasses.replace(deep(8), value_embedding=ValueEmbeddingConfig((1, 7), 8))
    with pytest.raises(ConfigError, match=r"drop the layers \[2, 3\] .* of layers \[1, 7\] by num"):
        plan_retrofit(numbered, recurrent(2, 3, 1), None)


def test_a_retrofitted_model_keeps_what_the_plain_one_has_learned(plain):
    """Ahead of a fresh recurrent model, at a depth that the plain one does not have."""
    params, _ = plain
    targets = jnp.roll(TOKENS, -1, 1)

    def loss(model, params, num_steps):
        logits = model.apply({"params": params}, TOKENS, num_steps=num_steps).logits
        return token_loss(logits, targets, jnp.ones(TOKENS.shape)).cross_entropy / TOKENS.size

    model = build(PLAIN)
    learn = jax.jit(
        lambda params: jax.tree.map(
            lambda p, g: p - 0.5 * g, params, jax.grad(lambda p: loss(model, p, 0))(params)
        )
    )
    for _ in range(3):
        params = learn(params)
    model, ours = retrofitted(recurrent(), params)
    recurrent_loss = jax.jit(lambda params: loss(model, params, 3))
    fresh = recurrent_loss(init_params(model, jax.random.key(1)))
    assert recurrent_loss(ours) < fresh - 0.3


def test_options_of_a_recurrent_model_keep_all_layers() -> None:
    options = retrofit_options(deep(6))
    assert {name: options[f"{name}_layers"] for name in ("prelude", "core", "coda")} == {
        "prelude": 1,
        "core": 4,
        "coda": 1,
    }
    target = construct(ModelConfig, plain_values(to_dict(deep(6)) | options))
    assert plan_retrofit(deep(6), target, None).dropped == ()
    assert target.attention == PLAIN.attention
    with pytest.raises(ConfigError, match=r"at least 3 layers, .* has 2; choose a deeper one"):
        retrofit_options(dataclasses.replace(PLAIN, prelude_layers=2, coda_layers=0))
    with pytest.raises(ConfigError, match="core_layers=1; set retrofit=False"):
        retrofit_options(recurrent())


def test_every_layer_keeps_its_window() -> None:
    windows = AttentionConfig(num_heads=2, prelude_windows=(4, 0), coda_windows=(3,))
    source = dataclasses.replace(deep(6), attention=windows)
    options = retrofit_options(source)
    target = construct(ModelConfig, plain_values(to_dict(source) | options))
    found = [target.windows(stack) for stack in ("prelude", "core", "coda")]
    assert found == [(4,), (None, 4, None, 3), (3,)]
    assert plan_retrofit(source, target, None).dropped == ()
    attention = dataclasses.replace(target.attention, prelude_windows=(2,))
    other = dataclasses.replace(target, attention=attention)
    with pytest.raises(ConfigError, match=r"prelude_windows: with \(2,\) .* set it to \(4,\)"):
        plan_retrofit(source, other, None)
