"""Runs the model part by part and hands out what its layers compute.

Blocks are observed from outside, by capturing their outputs, and attention layers sow their
queries, keys and values, so that the model itself has no code for it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.megatransformer import MegaTransformer, pass_context
from megatransformer_jax.nn.block import Block
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.nn.layer_sharing import earlier_uses, stack_owners
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


def observe_prelude(
    model: MegaTransformer, params: Any, rows: Batch
) -> tuple[jax.Array, list[LayerOutput]]:
    """The prelude's output [B, T, D], and its layers."""
    context = _outer_context(model.config, rows)
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
    context = _outer_context(model.config, rows)
    _, seen = _apply(model, params, state, context, method="run_coda")
    return list(_layers(seen.get("coda", {}), model.config, "coda"))


def layer_names(config: ModelConfig, stack: str) -> list[str]:
    """Names of the layers of 'prelude', 'core' or 'coda', such as 'core/layer_1'."""
    return [f"{stack}/layer_{number}" for number in range(len(stack_owners(config, stack)))]


def _outer_context(config: ModelConfig, rows: Batch) -> LayerContext:
    return pass_context(config, rows.positions, rows.segment_ids, config.width)


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
    owners = stack_owners(config, stack)
    for owner, call in zip(owners, earlier_uses(owners), strict=True):
        block = seen[f"layer_{owner}"]
        yield LayerOutput(block["__call__"][call], *block["attention"]["query_key_value"][call])
