"""PEER against a NumPy loop over all experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from megatransformer_jax.config.layers import PeerConfig
from megatransformer_jax.config.model import MlpConfig
from megatransformer_jax.nn import peer as peer_module
from megatransformer_jax.nn.parameters import WeightInit
from megatransformer_jax.nn.peer import Peer
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

WIDTH, LENGTH, EPS = 6, 5, 1e-5
CONFIG = MlpConfig(
    kind="peer",
    activation="gelu",
    peer=PeerConfig(num_experts=25, num_heads=2, top_k=3, key_dim=4),
)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)), jnp.float32)


def build(config):
    module = Peer(config, WeightInit(0.3, 0.1, 0.3), DTypePolicy(), Sharder())
    params = nn.meta.unbox(jax.jit(lambda key: module.init(key, X, True))(jax.random.key(1)))
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        if path[-1].key == "query_var":
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32)
        return leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32)

    return module, jax.tree_util.tree_map_with_path(draw, params["params"])


def by_numpy(config, params, x, is_training):
    """Every expert is weighed; those that are not among the best get no weight."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    peer = config.peer
    queries = np.einsum("btd,dnc->btnc", x, p["query"])
    if peer.query_norm == "batch":
        flat = queries.reshape(-1, peer.num_heads * peer.key_dim)
        mean, var = flat.mean(0), flat.var(0)
        if not is_training:
            mean, var = p["query_mean"], p["query_var"]
        flat = (flat - mean) / np.sqrt(var + EPS) * p["query_scale"] + p["query_bias"]
        queries = flat.reshape(queries.shape)
    elif peer.query_norm == "layer":
        centred = queries - queries.mean(-1, keepdims=True)
        queries = centred / np.sqrt(queries.var(-1, keepdims=True) + EPS)
        queries = queries * p["query_scale"] + p["query_bias"]
    first, second = p["keys"]
    out = np.zeros_like(x, dtype=np.float64)
    for b, t, n in np.ndindex(queries.shape[:3]):
        half = np.split(queries[b, t, n], 2)
        scores = (first @ half[0])[:, None] + (second @ half[1])[None]
        scores = scores.reshape(-1)
        scores[scores < np.sort(scores)[-peer.top_k]] = -np.inf
        for expert, gate in enumerate(scipy.special.softmax(scores)):
            pre = p["expert_in"][expert] @ x[b, t]
            out[b, t] += gate * pre * scipy.special.ndtr(pre) * p["expert_out"][expert]
    return out


@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
def test_equals_a_loop_over_all_experts(query_norm, monkeypatch):
    peer = dataclasses.replace(CONFIG.peer, query_norm=query_norm)
    config = dataclasses.replace(CONFIG, peer=peer)
    module, params = build(config)
    is_batch = query_norm == "batch"
    assert ("query_mean" in params) == is_batch
    for is_training in (False, True) if is_batch else (False,):
        wanted = by_numpy(config, params, np.asarray(X), is_training)
        # One block, and blocks of a single column each.
        for limit in (2**20, 100) if is_batch else (100,):
            monkeypatch.setattr(peer_module, "MAX_GATHERED", limit)
            run = jax.jit(lambda params, mode=not is_training: module.apply(params, X, mode))
            ours = run({"params": params})
            np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_never_gathers_for_all_tokens_at_once(monkeypatch):
    """No intermediate has the size of all gathered rows, nor has the gradient's."""
    monkeypatch.setattr(peer_module, "MAX_GATHERED", 100)
    module, params = build(CONFIG)
    gathered = X.size * CONFIG.peer.num_heads * CONFIG.peer.top_k

    def loss(params):
        return jnp.sum(module.apply({"params": params}, X, False))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    assert max(sizes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)) < gathered
    monkeypatch.setattr(peer_module, "MAX_GATHERED", 2**20)
    assert max(sizes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)) >= gathered


def test_starts_like_an_mlp_of_its_active_neurons():
    config = MlpConfig(
        kind="peer", activation="relu", peer=PeerConfig(num_experts=4096, num_heads=4, top_k=8)
    )
    width, inits = 32, WeightInit(0.1, 0.02, 0.1)
    module = Peer(config, inits, DTypePolicy(), Sharder())
    x = jax.random.normal(jax.random.key(0), (4, 64, width))

    @jax.jit
    def run(key):
        params = nn.meta.unbox(module.init(key, x, True))["params"]
        return params, module.apply({"params": params}, x, False)

    params, out = run(jax.random.key(1))
    spread = 0.98658  # Of a normal variable that is cut at three standard deviations.
    for name, std in (
        ("query", 0.1), ("expert_in", 0.1), ("expert_out", 0.02 * 8), ("keys", 64**-0.5)
    ):  # fmt: skip
        assert np.std(params[name]) == pytest.approx(std * spread, rel=0.02)
    # An MLP of F = 32 neurons: std_out^2 * F * E[relu(pre)^2], where pre has variance D std_in^2.
    wanted = 0.02**2 * 32 * (width * 0.1**2) / 2
    assert np.var(out) == pytest.approx(wanted, rel=0.25)


def test_dropout_acts_in_training_only():
    config = dataclasses.replace(
        CONFIG, dropout_rate=0.5, peer=dataclasses.replace(CONFIG.peer, query_norm="none")
    )
    module, params = build(config)
    still = module.apply({"params": params}, X, True)
    dropped = module.apply({"params": params}, X, False, rngs={"dropout": jax.random.key(2)})
    assert np.max(np.abs(dropped - still)) > 1e-4
