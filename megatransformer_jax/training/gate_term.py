"""The exit gate's term of the loss."""

from typing import Any, cast

import jax
from jaxtyping import Array, Float, Key

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.tokens import (
    ExitLoss,
    exit_log_probs,
    exit_loss,
    geometric_log_prior,
    token_cross_entropy,
    uniform_log_prior,
)
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.models.passes.observed import first_state, observe_iterations, open_core
from megatransformer_jax.types import Batch


def gate_steps(config: RunConfig) -> int:
    """Iterations that the term looks at."""
    wanted = config.train.exit_gate.max_steps
    return 2 * config.model.recurrence.mean_steps if wanted is None else wanted


def gate_term(
    model: MegaTransformer, config: RunConfig, params: Any, part: Batch, key: Key[Array, ""]
) -> ExitLoss:
    """The term's sums over a micro-batch, from a pass of its own over all iterations.

    Every iteration's state goes through coda and head. Gradients flow to the core through the last
    `recurrence.backprop_depth` iterations; with `train.exit_gate.detach` to the gate alone, and
    then nothing of the pass is stored for the backward pass but the states. No dropout: the gate
    learns from what the model does in use.
    """
    options = config.train.exit_gate
    params = gather_weights(model, params)
    if options.detach:
        params = {**jax.lax.stop_gradient(params), "exit_gate": params["exit_gate"]}
    core = open_core(
        model, params, part.tokens, positions=part.positions, segment_ids=part.segment_ids
    )

    def apply(*arguments: Any, method: str) -> Any:
        return model.apply({"params": params}, *arguments, method=method)

    def observe(state: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, hidden = apply(state, core.outer, method="run_coda")
        losses = token_cross_entropy(apply(hidden, method="run_head"), part.targets)
        return losses, apply(state, method="run_gate")

    num_steps = gate_steps(config)
    losses, gate_logits = cast(
        tuple[jax.Array, jax.Array],
        observe_iterations(
            model,
            core,
            first_state(model, core, key),
            observe,
            num_steps=num_steps,
            backprop_depth=config.model.recurrence.backprop_depth,
        ),
    )
    return exit_loss(
        exit_log_probs(gate_logits), losses, part.loss_mask, _log_prior(config, num_steps)
    )


def _log_prior(config: RunConfig, num_steps: int) -> Float[Array, "n"]:
    mean = config.train.exit_gate.prior_mean
    return uniform_log_prior(num_steps) if mean is None else geometric_log_prior(num_steps, mean)
