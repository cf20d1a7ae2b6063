"""FLOPs agree with what XLA counts in the compiled program, and with the weights' sizes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.config.layers import AttentionConfig, PeerConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.cost.flops import forward_flops, mean_keys, train_flops
from megatransformer_jax.models.megatransformer import MegaTransformer, abstract_params, build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import Batch, DTypePolicy

ROWS, LENGTH = 2, 64  # Short enough for attention in one block, which multiplies all keys.
BASE = ModelConfig(
    vocab_size=2048,
    width=256,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    recurrence=RecurrenceConfig(backprop_depth=2, unroll=2),
)
VARIANTS = {
    "linear": BASE,
    "diagonal_core_width": dataclasses.replace(
        BASE,
        recurrence=RecurrenceConfig(adapter="diagonal", core_width=128, readout_matrix=True),
    ),
    "sum_plain_mlp_untied": dataclasses.replace(
        BASE,
        tie_embeddings=False,
        mlp=MlpConfig(kind="mlp", hidden_width=512, activation="relu"),
        norm=NormConfig(placement="sandwich"),
        recurrence=RecurrenceConfig(adapter="sum"),
    ),
    "peer": dataclasses.replace(
        BASE,
        mlp=MlpConfig(
            kind="peer", peer=PeerConfig(num_experts=4096, num_heads=8, top_k=16, key_dim=64)
        ),
    ),
    "no_core": dataclasses.replace(BASE, core_layers=0, recurrence=RecurrenceConfig()),
}


def build(config: ModelConfig) -> MegaTransformer:
    return build_model(config, DTypePolicy(), Sharder(), "cpu")


def xla_flops(function: Any, *arguments: Any) -> float:
    """XLA counts the body of a loop once, whatever its length."""
    analysis: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return analysis["flops"]


def abstract_batch() -> Batch:
    integers = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    mask = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)
    return Batch(integers, integers, mask, integers, integers)


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_agrees_with_xla(name: str) -> None:
    config = VARIANTS[name]
    model = build(config)

    def forward(params: Any, tokens: jax.Array, num_steps: jax.Array) -> jax.Array:
        rngs = {"state": jax.random.key(0)}
        output: Any = model.apply({"params": params}, tokens, num_steps=num_steps, rngs=rngs)
        return output.logits

    tokens, num_steps = abstract_batch().tokens, jax.ShapeDtypeStruct((), jnp.int32)
    counted = xla_flops(forward, abstract_params(model), tokens, num_steps)
    expected = ROWS * LENGTH * forward_flops(config, LENGTH, visible_keys_only=False).total(1)
    # XLA counts norms and activations too.
    assert 1.0 <= counted / expected < 1.05


@pytest.mark.parametrize(
    ("remat", "gradient"),
    [("none", "truncated"), ("full", "truncated"), ("full", "implicit")],
)
def test_training_agrees_with_xla(remat: str, gradient: str) -> None:
    recurrence = RecurrenceConfig(backprop_depth=2, gradient=gradient)
    if gradient == "truncated":
        recurrence = BASE.recurrence
    config = dataclasses.replace(
        BASE, core_layers=1, coda_layers=0, remat=remat, recurrence=recurrence
    )
    model, optimizer = build(config), optax.sgd(1e-3)
    train_step = make_train_step(model, optimizer, RunConfig(model=config))

    def step(params: Any, batch: Batch) -> Any:
        zero, key_data = jnp.int32(0), jax.random.key_data(jax.random.key(0))
        state = TrainState(zero, params, optimizer.init(params), key_data, zero, zero)
        new_state, metrics = train_step(state, batch)
        return new_state.params, metrics

    counted = xla_flops(step, abstract_params(model), abstract_batch())
    # The loop without gradients is counted once, the two unrolled gradient iterations twice; before
    # an implicit gradient there is one iteration less without.
    forward = forward_flops(config, LENGTH, visible_keys_only=False)
    flops = train_flops(config, forward, num_steps=3 if gradient == "truncated" else 2)
    assert 0.95 < counted / (ROWS * LENGTH * flops.hardware) < 1.05
    if remat == "none":
        assert 1.0 <= counted / (ROWS * LENGTH * flops.model) < 1.05


# Of PEER's tables a token meets few rows.
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "peer"])
def test_products_with_weights_cost_twice_their_size(name: str) -> None:
    config = VARIANTS[name]
    params = abstract_params(build(config))
    # The untied token table is looked up; a tied one is the head.
    if not config.tie_embeddings:
        del params["embedding"]["embedding"]
    weights = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    flops = forward_flops(config, LENGTH)
    layers = [*flops.once.values(), flops.iteration]
    attention = sum(products.get("attention", 0.0) for products in layers)
    assert flops.total(1) - attention == 2 * weights


@pytest.mark.parametrize("window", [None, 1, 3, 10, 99])
def test_mean_keys_is_the_mean_of_the_mask(window: int | None) -> None:
    length = 10
    distance = np.arange(length)[:, None] - np.arange(length)
    mask = (distance >= 0) & (distance < (window or length))
    assert mean_keys(length, window) == pytest.approx(mask.sum(axis=1).mean())


def test_iterations_without_gradients_cost_a_third() -> None:
    flops = forward_flops(BASE, LENGTH)  # backprop_depth is 2.
    at = {steps: train_flops(BASE, flops, steps).model for steps in (0, 1, 2, 3, 10)}
    assert at[0] == 3 * flops.once_total
    assert at[1] - at[0] == at[2] - at[1] == pytest.approx(3 * flops.iteration_total)
    assert at[3] - at[2] == pytest.approx(flops.iteration_total)
    assert at[10] - at[3] == pytest.approx(7 * flops.iteration_total)


def test_masked_iterations_are_work_for_the_hardware_only() -> None:
    flops = forward_flops(BASE, LENGTH)
    short, full = train_flops(BASE, flops, 1), train_flops(BASE, flops, 2)
    assert short.model < short.hardware == full.hardware == full.model


def test_remat_of_all_but_products_repeats_attention() -> None:
    config = dataclasses.replace(BASE, remat="dots")
    flops = forward_flops(config, LENGTH)
    trained = train_flops(config, flops, 8)
    per_layer = 4 * config.width * mean_keys(LENGTH, None)
    # Prelude, coda, and two core layers in each of the two gradient iterations.
    assert trained.hardware - trained.model == pytest.approx(6 * per_layer)


def test_peer_retrieves_again_in_the_backward_pass() -> None:
    config = VARIANTS["peer"]
    flops = forward_flops(config, LENGTH)
    peer, layers = (
        config.mlp.peer,
        1 + 2 * 2 + 1,
    )  # Two iterations of two layers between two others.
    keys = 2 * peer.num_heads * peer.key_dim * 64  # The root of 4096 experts.
    up = 2 * config.width * 8 * 16
    trained = train_flops(config, flops, 8)
    assert trained.hardware - trained.model == pytest.approx(layers * (keys + up))
    assert flops.once["prelude"]["query"] == 2 * config.width * 8 * 64
