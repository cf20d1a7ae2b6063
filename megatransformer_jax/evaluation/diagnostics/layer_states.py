"""Activations and token correlation of every layer, in every iteration."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from megatransformer_jax.evaluation.diagnostics.observed_layers import (
    layer_names,
    observe_coda,
    observe_iteration,
    observe_prelude,
)
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.observed import first_state, open_core
from megatransformer_jax.types import Batch, HostOrDeviceArray

# Values of a layer that a histogram is made of: enough for its shape at any width.
MAX_SAMPLES = 4096


class StateSummary(NamedTuple):
    """What is kept of the states [B, T, D] of a layer; with leading axes for several.

    Attributes:
      sample: up to `MAX_SAMPLES` values, the same places for all layers of a width.
      is_token: bool like `sample`, whether the value is a token's, and not padding's.
      rms: root mean square over tokens and channels, [].
      correlation: see `token_correlation`, [].
    """

    sample: HostOrDeviceArray
    is_token: HostOrDeviceArray
    rms: HostOrDeviceArray
    correlation: HostOrDeviceArray


class LayerStates(NamedTuple):
    """Of all layers.

    Attributes:
      outer: of prelude's and coda's layers, by name.
      core: of the core's layers, by name; each with a leading axis over iterations.
    """

    outer: dict[str, StateSummary]
    core: dict[str, StateSummary]


def token_correlation(
    states: Float[Array, "B T D"], is_token: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Mean cosine between the states of two different tokens of a row.

    1 where all tokens of a row have the same direction: the collapse of rank that attention alone
    would lead to (arXiv 2103.03404). Rows of fewer than two tokens do not count; 0 if all are such.
    """
    states = states.astype(jnp.float32)
    norm = jnp.linalg.norm(states, axis=-1, keepdims=True)
    units = jnp.where(is_token[..., None], states / jnp.where(norm == 0, 1.0, norm), 0.0)
    count = jnp.sum(is_token, axis=1).astype(jnp.float32)
    # |sum of u|^2 is the sum of all cosines, those of a token with itself included.
    total = jnp.sum(jnp.square(jnp.sum(units, axis=1)), axis=-1)
    itself = jnp.sum(jnp.square(units), axis=(1, 2))
    pairs = count * (count - 1.0)
    means = (total - itself) / jnp.maximum(pairs, 1.0)
    return jnp.sum(jnp.where(pairs > 0, means, 0.0)) / jnp.maximum(jnp.sum(pairs > 0), 1)


def summarize(states: Float[Array, "B T D"], is_token: Bool[Array, "B T"]) -> StateSummary:
    """What is kept of one layer's states."""
    size, width = states.size, states.shape[-1]
    places = np.arange(size)
    if size > MAX_SAMPLES:
        # At random, as even strides would meet the same channels again and again.
        places = np.sort(np.random.default_rng(0).choice(size, MAX_SAMPLES, replace=False))
    states = states.astype(jnp.float32)
    counted = jnp.where(is_token[..., None], jnp.square(states), 0.0)
    num_values = jnp.maximum(jnp.sum(is_token) * width, 1)
    return StateSummary(
        sample=states.reshape(-1)[places],
        is_token=is_token.reshape(-1)[places // width],
        rms=jnp.sqrt(jnp.sum(counted) / num_values),
        correlation=token_correlation(states, is_token),
    )


def layer_states(
    model: MegaTransformer, params: Any, rows: Batch, *, mean_steps: int, num_steps: int, seed: int
) -> LayerStates:
    """Runs the rows through the model and summarises every layer's output.

    Args:
      model: without a mesh.
      params: its parameters.
      rows: tokens, positions and segments are read.
      mean_steps: iterations after which the coda is run, or `num_steps` if that is less.
      num_steps: iterations that are looked at.
      seed: of the first state.
    """
    config = model.config
    is_token = rows.segment_ids > 0
    state, prelude = observe_prelude(model, params, rows)
    named = dict(zip(layer_names(config, "prelude"), prelude, strict=True))
    core_summaries: dict[str, StateSummary] = {}
    if config.is_recurrent:
        core = open_core(
            model, params, rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids
        )
        start = first_state(model, core, jax.random.key(seed))

        def iterate(carry: tuple[jax.Array, jax.Array], number: jax.Array) -> Any:
            state, output = carry
            state, layers = observe_iteration(
                model, core.params, state, core.prepared, core.context
            )
            output = jnp.where(number == min(mean_steps, num_steps) - 1, state, output)
            return (state, output), [summarize(layer.states, is_token) for layer in layers]

        (_, state), summaries = jax.lax.scan(iterate, (start, start), jnp.arange(num_steps))
        core_summaries = dict(zip(layer_names(config, "core"), summaries, strict=True))
    coda = observe_coda(model, params, state, rows)
    named |= dict(zip(layer_names(config, "coda"), coda, strict=True))
    outer = {name: summarize(layer.states, is_token) for name, layer in named.items()}
    return LayerStates(outer, core_summaries)
