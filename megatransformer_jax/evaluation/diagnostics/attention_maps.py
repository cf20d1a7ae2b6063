"""How much each token attends to each other one, for drawing."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.evaluation.diagnostics.observed_layers import (
    LayerOutput,
    layer_names,
    observe_coda,
    observe_iteration,
    observe_prelude,
)
from megatransformer_jax.models.megatransformer import MegaTransformer, pass_context
from megatransformer_jax.models.passes.observed import core_step, first_state, open_core
from megatransformer_jax.ops.attention_xla import MASKED_LOGIT, masked_softmax
from megatransformer_jax.ops.masks import AttentionMask, dense_mask, row_distance
from megatransformer_jax.ops.positions import alibi_slopes
from megatransformer_jax.types import Batch

# A map of more tokens could not be read, and takes memory that grows with their square.
MAX_TOKENS = 256


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    logit_softcap: float | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
) -> Float[Array, "B N T S"]:
    """The weights that `ops.attention.attention` gives to the values; arguments as there.

    Each row sums to 1, or to 0 for a query that may attend to nothing.
    """
    groups = query.shape[2] // key.shape[2]
    key = jnp.repeat(key, groups, axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    if alibi_slopes is not None:
        distance = jnp.abs(row_distance(mask.query_offset, query.shape[1], key.shape[1]))
        logits = logits - alibi_slopes[:, None, None] * distance[:, None]
    allowed = dense_mask(mask, query.shape[1], key.shape[1])
    if allowed is not None:
        logits = jnp.where(allowed[:, None], logits, MASKED_LOGIT)
    return masked_softmax(logits)


def attention_maps(
    model: MegaTransformer, params: Any, rows: Batch, *, mean_steps: int, seed: int
) -> dict[str, Float[Array, "N T T"]]:
    """Weights of every layer for the first `MAX_TOKENS` tokens of the first row.

    Of the core the first iteration and the one at the trained mean, if they differ.

    Args:
      model: without a mesh.
      params: its parameters.
      rows: tokens, positions and segments are read, of the first row.
      mean_steps: trained mean of the iterations; ignored without a core.
      seed: of the first state.

    Returns:
      By the layer's name. What is cut off does not matter: no token sees a later one.
    """
    config = model.config
    row = jax.tree.map(lambda part: part[:1, :MAX_TOKENS], rows)
    state, layers = observe_prelude(model, params, row)
    found = dict(zip(layer_names(config, "prelude"), layers, strict=True))
    if config.is_recurrent:
        state, observed = _core_layers(model, params, row, mean_steps, seed)
        found |= observed
    coda = observe_coda(model, params, state, row)
    found |= dict(zip(layer_names(config, "coda"), coda, strict=True))
    mask = pass_context(config, row.positions, row.segment_ids, config.width).mask
    return {name: _weights(layer, config, mask)[0] for name, layer in found.items()}


def _core_layers(
    model: MegaTransformer, params: Any, row: Batch, mean_steps: int, seed: int
) -> tuple[jax.Array, dict[str, LayerOutput]]:
    """The state after the trained mean, and the core's layers in the iterations of the maps."""
    core = open_core(
        model, params, row.tokens, positions=row.positions, segment_ids=row.segment_ids
    )
    state = first_state(model, core, jax.random.key(seed))
    step = core_step(model, core)
    names = layer_names(model.config, "core")
    found: dict[str, LayerOutput] = {}
    done = 0
    for number in sorted({1, mean_steps}):
        state = jax.lax.fori_loop(
            0, jnp.int32(number - 1 - done), lambda _, s: step(core.params, s, core.prepared), state
        )
        state, layers = observe_iteration(model, core.params, state, core.prepared, core.context)
        found |= {
            f"{name}/iteration_{number}": layer for name, layer in zip(names, layers, strict=True)
        }
        done = number
    return state, found


def _weights(layer: LayerOutput, config: ModelConfig, mask: AttentionMask) -> jax.Array:
    slopes = None
    if config.positions.scheme == "alibi":
        slopes = alibi_slopes(config.attention.num_heads)
    return attention_weights(
        layer.query,
        layer.key,
        mask,
        logit_softcap=config.attention.logit_softcap,
        alibi_slopes=slopes,
    )
