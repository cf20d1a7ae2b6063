"""What diagnostics measure: attention, activations, token correlation, gradients, depth draws."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax.config.model import ModelConfig, RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.core import Pass, at_iteration, draw_num_steps
from megatransformer_jax.models.megatransformer import Entered, MegaTransformer, pass_context
from megatransformer_jax.models.passes.observed import open_batch
from megatransformer_jax.nn.block import Block
from megatransformer_jax.nn.layer_sharing import earlier_uses, stack_owners
from megatransformer_jax.nn.peer import is_statistic
from megatransformer_jax.ops.attention_xla import MASKED_LOGIT, masked_softmax
from megatransformer_jax.ops.masks import AttentionMask, dense_mask, row_distance
from megatransformer_jax.ops.positions import alibi_slopes
from megatransformer_jax.training.objective import MediaRoom, Place, count_media, make_objective
from megatransformer_jax.training.step import step_keys
from megatransformer_jax.training.trainable import path_text
from megatransformer_jax.types import Batch, HostOrDeviceArray

# ------------------------------------------------------------------------------
# Activations and token correlation of every layer, in every iteration.

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
      rows: tokens, positions, segments and media are read.
      mean_steps: iterations after which the coda is run, or `num_steps` if that is less.
      num_steps: iterations that are looked at.
      seed: of the first state.
    """
    config = model.config
    entered, prelude = observe_prelude(model, params, rows)
    state, is_token = entered.x, entered.is_token
    names = layer_names(config, "prelude")
    outer = {
        name: summarize(layer.states, entered.is_text)
        for name, layer in zip(names, prelude, strict=True)
    }
    core_summaries: dict[str, StateSummary] = {}
    if config.is_recurrent:
        _, core = open_batch(model, params, rows)
        start = core.first_state(jax.random.key(seed))

        def iterate(carry: tuple[jax.Array, jax.Array], number: jax.Array) -> Any:
            state, output = carry
            state, layers = observe_iteration(core, state, number)
            output = jnp.where(number == min(mean_steps, num_steps) - 1, state, output)
            return (state, output), [summarize(layer.states, is_token) for layer in layers]

        (_, state), summaries = jax.lax.scan(iterate, (start, start), jnp.arange(num_steps))
        core_summaries = dict(zip(layer_names(config, "core"), summaries, strict=True))
    coda = observe_coda(model, params, state, entered)
    names = layer_names(config, "coda")
    outer |= {
        name: summarize(layer.states, is_token) for name, layer in zip(names, coda, strict=True)
    }
    return LayerStates(outer, core_summaries)


# ------------------------------------------------------------------------------
# Runs the model part by part and hands out what its layers compute.
#
# Blocks are observed from outside, by capturing their outputs, and attention layers sow their
# queries, keys and values, so that the model itself has no code for it.


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
) -> tuple[Entered, list[LayerOutput]]:
    """What comes out of the text's prelude and the encoders of media, and the prelude's layers."""
    arguments = (rows.tokens, rows.positions, rows.segment_ids, rows.media)
    entered, seen = _apply(model, params, *arguments, method="enter")
    return entered, list(_layers(seen.get("prelude", {}), model.config, "prelude"))


def observe_iteration(
    core: Pass, state: jax.Array, iteration: jax.Array | int
) -> tuple[jax.Array, list[LayerOutput]]:
    """The next state [B, T, state width], and the core's layers."""
    context = at_iteration(core.core.config, core.context, iteration)
    new_state, seen = _apply(core.core, core.params, state, core.prepared, context)
    return new_state, list(_layers(seen["layers"], core.core.config, "core"))


def observe_coda(
    model: MegaTransformer, params: Any, state: jax.Array, entered: Entered
) -> list[LayerOutput]:
    """The coda's layers, from the core's state or, without a core, from the prelude's output."""
    context = entered.context(model.config, model.config.width)
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
    owners = stack_owners(config, stack)
    for owner, call in zip(owners, earlier_uses(owners), strict=True):
        block = seen[f"layer_{owner}"]
        yield LayerOutput(block["__call__"][call], *block["attention"]["query_key_value"][call])


# ------------------------------------------------------------------------------
# How much each token attends to each other one, for drawing.

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

    Places of media count as tokens. A layer of the prelude has weights at the text's places only,
    because it reads nothing else. Of the core the first iteration and the one at the trained mean,
    if they differ.

    Args:
      model: without a mesh.
      params: its parameters.
      rows: tokens, positions, segments and media are read, of the first row.
      mean_steps: trained mean of the iterations; ignored without a core.
      seed: of the first state.

    Returns:
      By the layer's name. What is cut off does not matter: no token sees a later one.
    """
    config = model.config
    row = jax.tree.map(lambda part: part[:1], rows)
    if row.media is None:
        row = jax.tree.map(lambda part: part[:, :MAX_TOKENS], row)
    entered, prelude = observe_prelude(model, params, row)
    state = entered.x
    found: dict[str, LayerOutput] = {}
    if config.is_recurrent:
        state, found = _core_layers(model, params, row, mean_steps, seed)
    coda = observe_coda(model, params, state, entered)
    found |= dict(zip(layer_names(config, "coda"), coda, strict=True))
    mask = _map_mask(config, entered.positions, entered.segment_ids)
    maps = {name: _weights(name, layer, config, mask) for name, layer in found.items()}
    if entered.layout is not None:
        text = jnp.where(entered.layout.is_medium, 0, entered.layout.segment_ids)
        mask = _map_mask(config, entered.positions, text)
    names = layer_names(config, "prelude")
    return maps | {
        name: _weights(name, layer, config, mask)
        for name, layer in zip(names, prelude, strict=True)
    }


def _map_mask(
    config: ModelConfig, positions: jax.Array, segment_ids: jax.Array | None
) -> AttentionMask:
    if segment_ids is not None:
        segment_ids = segment_ids[:, :MAX_TOKENS]
    return pass_context(config, positions[:, :MAX_TOKENS], segment_ids, config.width).mask


def _core_layers(
    model: MegaTransformer, params: Any, row: Batch, mean_steps: int, seed: int
) -> tuple[jax.Array, dict[str, LayerOutput]]:
    """The state after the trained mean, and the core's layers in the iterations of the maps."""
    _, core = open_batch(model, params, row)
    state = core.first_state(jax.random.key(seed))
    names = layer_names(model.config, "core")
    found: dict[str, LayerOutput] = {}
    done = 0
    for number in sorted({1, mean_steps}):
        first, last = jnp.int32(done), jnp.int32(number - 1)
        state = jax.lax.fori_loop(first, last, lambda i, state: core.iterate(state, i), state)
        state, layers = observe_iteration(core, state, last)
        found |= {
            f"{name}/iteration_{number}": layer for name, layer in zip(names, layers, strict=True)
        }
        done = number
    return state, found


def _weights(name: str, layer: LayerOutput, config: ModelConfig, mask: AttentionMask) -> jax.Array:
    """Of a layer named by `layer_names`, which may have its own window."""
    stack, number = name.split("/")[:2]
    window = config.windows(stack)[int(number.removeprefix("layer_"))]
    mask = dataclasses.replace(mask, window=window)
    slopes = None
    if config.positions.scheme == "alibi":
        slopes = alibi_slopes(config.attention.num_heads)
    weights = attention_weights(
        layer.query[:, :MAX_TOKENS],
        layer.key[:, :MAX_TOKENS],
        mask,
        logit_softcap=config.attention.logit_softcap,
        alibi_slopes=slopes,
    )
    return weights[0]


# ------------------------------------------------------------------------------
# Norms of gradients and weights by layer.


class LayerNorms(NamedTuple):
    """Root of the sum of squares over all parameters of a layer, by its name.

    Attributes:
      gradient: of the loss with respect to them, float32 [] by layer.
      weight: of themselves.
    """

    gradient: dict[str, HostOrDeviceArray]
    weight: dict[str, HostOrDeviceArray]


def norms_by_layer(tree: Any) -> dict[str, Float[Array, ""]]:
    """Norms of the groups of arrays that belong together (`layer_of`), in the tree's order.

    Running statistics are not weights, and what takes the place of their gradients is none.
    """
    squares: dict[str, jax.Array] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        if is_statistic(path):
            continue
        name = layer_of(path_text(path))
        square = jnp.sum(jnp.square(array.astype(jnp.float32)))
        squares[name] = squares[name] + square if name in squares else square
    return {name: jnp.sqrt(total) for name, total in squares.items()}


def layer_of(path: str) -> str:
    """The layer of a parameter: 'core/layers/layer_0/mlp/up' is of 'core/layers/layer_0'.

    Outside of layers it is the part of the model, 'embedding', or of the core or of the parts for
    media, 'core/adapter' or 'media/image_decoder'.
    """
    parts = path.split("/")
    for number, part in enumerate(parts):
        if part.startswith("layer_"):
            return "/".join(parts[: number + 1])
    return "/".join(parts[:2]) if parts[0] in ("core", "media") else parts[0]


def gradient_norms(
    model: MegaTransformer,
    config: RunConfig,
    params: Any,
    rows: Batch,
    step: Int[Array, ""],
    *,
    num_steps: int,
    seed: int,
) -> LayerNorms:
    """Norms for what training minimises (`make_objective`, dropout included), on these rows.

    Args:
      model: the model.
      config: of the run.
      params: the model's parameters.
      rows: all of a batch is read.
      step: optimiser steps done, for terms that warm up.
      num_steps: iterations; gradients flow through the last ones, as in training.
      seed: of first state and dropout.
    """
    media, room = rows.media, None
    if media is not None:
        # As many as there are slots, for a few rows may be of one task.
        slots = (media.is_image, media.mel_lengths)
        room = MediaRoom(*(0 if array is None else array.size for array in slots))
    objective = make_objective(model, config, room)
    counts = None if media is None else count_media(media)
    place = Place(step, jnp.maximum(jnp.sum(rows.loss_mask), 1.0), 1.0, counts)

    def loss(params: Any) -> jax.Array:
        return objective(params, rows, jnp.int32(num_steps), jax.random.key(seed), place)[0]

    return LayerNorms(norms_by_layer(jax.grad(loss)(params)), norms_by_layer(params))


# ------------------------------------------------------------------------------
# How many iterations the steps of training drew.


def count_draws(
    config: RecurrenceConfig,
    run_key: Key[Array, ""],
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
    batch_size: int,
    length: int,
) -> Int[Array, "max_steps"]:
    """How often each number of iterations was drawn, entry i - 1 for i of them.

    Nothing was recorded: a draw depends on the run's key and its step alone, so it is made again.

    Args:
      config: distribution and what gets a draw of its own.
      run_key: of the train state.
      first: number of the first step that counts, from 1; traced.
      last: number of the last one.
      batch_size: B, for draws per sequence or token.
      length: T, or S with media, for draws per token.
    """

    def add(step: jax.Array, counts: jax.Array) -> jax.Array:
        depth_key = step_keys(run_key, step).depth
        draws = draw_num_steps(config, depth_key, step, batch_size, length)
        return counts + jnp.bincount(draws.reshape(-1) - 1, length=config.max_steps)

    # Step n is made after n - 1 others.
    counts = jnp.zeros(config.max_steps, jnp.int32)
    return jax.lax.fori_loop(jnp.asarray(first) - 1, jnp.asarray(last), add, counts)


# ------------------------------------------------------------------------------
# Puts layers, which JAX returns sorted by name, back into the model's order.

Value = TypeVar("Value")

# First parts of names, in the order in which a forward pass meets them; others come last.
_PARTS = (
    "embedding",
    "prelude",
    "media",
    "injection_norm",
    "core_in",
    "core",
    "core_out",
    "c_matrix",
    "exit_gate",
    "coda",
    "final_norm",
)


def in_model_order(values: Mapping[str, Value]) -> dict[str, Value]:
    """The same mapping, its names as 'core/layer_0/iteration_4' in the model's order.

    Of the core's, iterations come one after the other, each with its layers.
    """
    return dict(sorted(values.items(), key=lambda item: _rank(item[0])))


def _rank(name: str) -> tuple[int, int, int, str]:
    part = name.partition("/")[0]
    place = _PARTS.index(part) if part in _PARTS else len(_PARTS)
    return place, _number("iteration", name), _number("layer", name), name


def _number(word: str, name: str) -> int:
    found = re.search(rf"{word}_(\d+)", name)
    return int(found[1]) if found else -1
