"""Writes a workdir as training leaves it, without training."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.build import save_config
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import init_params
from megatransformer_jax.runs.build import build_sharded_model
from megatransformer_jax.runs.tasks.start import run_info
from megatransformer_jax.runs.tokenizers import start_tokenizer


def write_run(
    config: RunConfig,
    losses: Mapping[int, float | None],
    accuracies: Mapping[int, float] | None = None,
) -> dict[int, Any]:
    """The workdir with a checkpoint per validation loss; some may have an accuracy too.

    Returns:
      The parameters by step, drawn at random.
    """
    workdir = pathlib.Path(config.workdir)
    workdir.mkdir(exist_ok=True)
    tokenizer = start_tokenizer(config, workdir)
    model, _ = build_sharded_model(config)
    checkpoints = CheckpointManager(workdir / "checkpoints", config.checkpoint)
    run = run_info(config, tokenizer.digest())
    saved = {}
    for step, loss in losses.items():
        params = init_params(model, jax.random.key(step))
        state = {"params": params, "optimizer": {"moment": jax.tree.map(jnp.zeros_like, params)}}
        scores = {} if loss is None else {"validation/loss": loss}
        if accuracies is not None and step in accuracies:
            scores["validation/accuracy"] = accuracies[step]
        checkpoints.save(step, state, {}, run, scores)
        saved[step] = jax.device_get(params)
    checkpoints.close()
    save_config(config, workdir / "config.json")
    return saved
