"""A fresh run with Admin profiles its first batch and then trains on it."""

from typing import Any

import jax
import numpy as np
import optax
from absl import logging

from megatransformer_jax.config.build import build
from megatransformer_jax.data.pipeline import build_pipeline
from megatransformer_jax.runs.build import build_sharded_model
from megatransformer_jax.runs.tasks.start import admin_state, first_batch, fresh_state
from megatransformer_jax.runs.tokenizers import start_tokenizer


def test_a_fresh_run_starts_from_its_first_batch(tmp_path, small_run, monkeypatch):
    model_options = {
        "residual": "admin",
        "norm": {"placement": "post"},
        "prelude_layers": 2,
        "coda_layers": 0,
    }
    config = build(small_run(tmp_path, {"model": model_options, "mesh": {"fsdp": 2}}))
    tokenizer = start_tokenizer(config, tmp_path)
    model, sharder = build_sharded_model(config)
    optimizer = optax.trace(0.9, accumulator_dtype=None)
    lines: list[str] = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    with build_pipeline(config.data, tokenizer, split="train") as batches:
        before = batches.get_state()
        state = fresh_state(config, model, optimizer, sharder, tokenizer, batches)
        assert batches.get_state() == before
        batch = first_batch(batches, sharder)
        np.testing.assert_array_equal(next(batches).tokens, batch.tokens)

    first, last = (state.params["prelude"][f"layer_{layer}"] for layer in (0, 1))
    assert np.all(first["attention_residual_scale"] == 1)
    omega = np.asarray(last["mlp_residual_scale"])
    assert np.all(omega == omega[0]) and 0 < omega[0] != 1
    assert f"admin: prelude.layer_1.mlp_residual_scale starts at {omega[0]:.4g}" in lines

    shardings: Any = jax.tree.map(lambda leaf: leaf.sharding, state)
    other = batch._replace(tokens=(batch.tokens + 7) % 256)
    changed = admin_state(config, model, optimizer, shardings, other)
    assert not np.allclose(
        changed.params["prelude"]["layer_1"]["mlp_residual_scale"], omega, rtol=1e-6
    )
    np.testing.assert_array_equal(
        changed.params["embedding"]["embedding"], state.params["embedding"]["embedding"]
    )
