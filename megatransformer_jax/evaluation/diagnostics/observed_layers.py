"""Runs the model part by part and hands out what its layers compute.

Blocks are observed from outside, by capturing their outputs, and attention layers sow their
queries, keys and values, so that the model itself has no code for it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.megatransformer import MegaTransformer, layer_context
from megatransformer_jax.nn.block import Block
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.nn.layer_sharing import stack_owners
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.types import Batch


class LayerOutput(NamedTuple):
    """What one layer computed.

    Attributes:
      states: the layer's output.
      query: of its attention, as the attention kernel gets it.
      key: the same.
      value: the same.
    """

    states: Float[Array, "B T D"]
    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K H"]


def pass_context(config: ModelConfig, rows: Batch, width: int) -> LayerContext:
    """What the layers of a stack of this width share, without dropout."""
    mask = AttentionMask(
        is_causal=True,
        window=config.attention.window,
        query_segment_ids=rows.segment_ids,
        key_segment_ids=rows.segment_ids,
    )
    return layer_context(config, rows.positions, mask, width)


def observe_prelude(
    model: MegaTransformer, params: Any, rows: Batch
) -> tuple[jax.Array, list[LayerOutput]]:
    """The prelude's output [B, T, D], and its layers."""
    context = pass_context(model.config, rows, model.config.width)
    arguments = (rows.tokens, rows.positions, context)
    x, seen = _apply(model, params, *arguments, method="run_prelude")
    return x, list(_layers(seen.get("prelude", {}), model.config, "prelude"))


def observe_iteration(
    model: MegaTransformer,
    core_params: Any,
    state: jax.Array,
    prepared: jax.Array,
    context: LayerContext,
) -> tuple[jax.Array, list[LayerOutput]]:
    """The next state [B, T, core width], and the core's layers."""
    new_state, seen = _apply(model.core(), core_params, state, prepared, context)
    return new_state, list(_layers(seen["layers"], model.config, "core"))


def observe_coda(
    model: MegaTransformer, params: Any, state: jax.Array, rows: Batch
) -> list[LayerOutput]:
    """The coda's layers, from the core's state or, without a core, from the prelude's output."""
    context = pass_context(model.config, rows, model.config.width)
    _, seen = _apply(model, params, state, context, method="run_coda")
    return list(_layers(seen.get("coda", {}), model.config, "coda"))


def layer_names(config: ModelConfig, stack: str) -> list[str]:
    """Names of the layers of 'prelude', 'core' or 'coda', such as 'core/layer_1'."""
    return [f"{stack}/layer_{number}" for number in range(len(stack_owners(config, stack)))]


def _apply(module: nn.Module, params: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    result, seen = cast(
        Any,
        module.apply(
            {"params": params},
            *arguments,
            mutable=["intermediates"],
            capture_intermediates=lambda part, name: isinstance(part, Block) and name == "__call__",
            **options,
        ),
    )
    return result, seen.get("intermediates", {})


def _layers(seen: Any, config: ModelConfig, stack: str) -> Iterator[LayerOutput]:
    """In their order. The calls of a block that several layers share are in theirs."""
    calls: dict[int, int] = {}
    for owner in stack_owners(config, stack):
        block, call = seen[f"layer_{owner}"], calls.get(owner, 0)
        calls[owner] = call + 1
        yield LayerOutput(block["__call__"][call], *block["attention"]["query_key_value"][call])


def trained_state(
    model: MegaTransformer,
    params: Any,
    state: jax.Array,
    prepared: jax.Array,
    context: LayerContext,
    num_steps: int,
) -> jax.Array:
    """The state after `num_steps` more iterations; `params` are the core's."""
    core = model.core()

    def iterate(_: jax.Array, state: jax.Array) -> jax.Array:
        return cast(jax.Array, core.apply({"params": params}, state, prepared, context))

    return jax.lax.fori_loop(0, jnp.int32(num_steps), iterate, state)
