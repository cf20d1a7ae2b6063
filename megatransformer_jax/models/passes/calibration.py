"""What the matrices of a model multiply: second moments of their inputs over all iterations.

Methods that round matrices by what they are used for (GPTQ, AWQ) need the inputs of each. In a core
these differ from iteration to iteration, and a matrix has one set of numbers for all of them. So
inputs are summed over every iteration, with the depths that training draws: an iteration counts
as often as training makes it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Key

from megatransformer_jax.models.core import Pass, at_iteration, draw_num_steps
from megatransformer_jax.models.megatransformer import MegaTransformer, open_pass
from megatransformer_jax.nn.quantized import PRODUCT_INPUTS
from megatransformer_jax.types import Batch


@struct.dataclass
class Moments:
    """Of the inputs x of one matrix.

    Attributes:
      second: float32 [K, K], the sum of x x^T over tokens and iterations.
      absolute: float32 [K], the sum of |x|.
      count: float32 [], how many there were.
    """

    second: Any
    absolute: Any
    count: Any


MomentsByPath = Mapping[str, Moments]


@functools.partial(jax.jit, static_argnames=("model", "paths"))
def input_moments(
    model: MegaTransformer,
    params: Any,
    batch: Batch,
    key: Key[Array, ""],
    paths: tuple[str, ...],
) -> dict[str, Moments]:
    """Sums over the tokens of a batch and the iterations of a training step at the end of its ramp.

    Args:
      model: the model.
      params: its parameters.
      batch: of text; tokens, positions and segments are read; padding does not count.
      key: for depths and first states.
      paths: of the matrices.

    Raises:
      ValueError: if no layer says what it multiplies a matrix by.
    """
    config, is_token = model.config, batch.segment_ids > 0
    variables = {"params": params}
    places = (batch.positions, batch.segment_ids)
    entered, sown = _apply(model, variables, batch.tokens, *places, method="enter")
    found = _moments(sown, "", is_token, paths)
    x = entered.x
    if config.is_recurrent:
        core = open_pass(model, params, x, entered.context(config, config.core_width))
        _, sown = _apply(core.core, {"params": core.params}, core.injected, method="prepare")
        found |= _moments(sown, "core/", is_token, paths)
        x, of_iterations = _over_iterations(core, key, is_token, paths)
        found |= of_iterations
    outer = entered.context(config, config.width)
    (_, hidden), sown = _apply(model, variables, x, outer, method="run_coda")
    found |= _moments(sown, "", is_token, paths)
    _, sown = _apply(model, variables, hidden, method="run_head")
    found |= _moments(sown, "", is_token, paths)
    unknown = [path for path in paths if path not in found]
    if unknown:
        raise ValueError(f"no layer says what it multiplies {', '.join(unknown)} by")
    return found


def add_moments(total: MomentsByPath | None, more: MomentsByPath) -> MomentsByPath:
    """The sums over two batches; `total` None: over `more` alone."""
    return more if total is None else jax.tree.map(jnp.add, total, more)


def _over_iterations(
    core: Pass, key: jax.Array, is_token: Bool[Array, "B T"], paths: tuple[str, ...]
) -> tuple[jax.Array, dict[str, Moments]]:
    """The last state, and the sums over the iterations that each token takes."""
    recurrence = core.core.config.recurrence
    depth_key, state_key = jax.random.split(key)
    # The ramp is over then.
    num_steps = draw_num_steps(recurrence, depth_key, recurrence.ramp_steps, *is_token.shape)
    total = jnp.max(num_steps)
    # As in `recur`: all end together.
    begin = total - num_steps
    begin = begin[:, None] if begin.ndim == 1 else begin

    def iterate(state: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, Moments]]:
        # Rows that join later begin with the first of their own iterations.
        number = jnp.maximum(step - begin, 0)
        context = at_iteration(core.core.config, core.context, number)
        new_state, sown = _apply(core.core, {"params": core.params}, state, core.prepared, context)
        has_joined = jnp.broadcast_to(step >= begin, is_token.shape)
        state = jnp.where(has_joined[..., None], new_state, state)
        return state, _moments(sown, "core/", is_token & has_joined, paths)

    def body(step: jax.Array, carry: Any) -> Any:
        state, sums = carry
        state, more = iterate(state, step)
        return state, jax.tree.map(jnp.add, sums, more)

    state = core.first_state(state_key)
    shapes = jax.eval_shape(iterate, state, jnp.int32(0))[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, total, body, (state, zeros))


def _apply(
    module: Any, variables: Any, *arguments: Any, method: str | None = None
) -> tuple[Any, dict[str, Any]]:
    result, sown = module.apply(variables, *arguments, method=method, mutable=[PRODUCT_INPUTS])
    return result, sown.get(PRODUCT_INPUTS, {})


def _moments(
    sown: Any, prefix: str, counts: Bool[Array, "B T"], paths: tuple[str, ...]
) -> dict[str, Moments]:
    """Of what layers have sown below `prefix`; layers that share a matrix add up."""
    found = {}
    for name, inputs in flatten_dict(sown, sep="/").items():
        if f"{prefix}{name}" in paths:
            each = [_moments_of(x, counts) for x in inputs]
            found[f"{prefix}{name}"] = jax.tree.map(lambda *parts: sum(parts), *each)
    return found


def _moments_of(x: Float[Array, "B T K"], counts: Bool[Array, "B T"]) -> Moments:
    rows = jnp.where(counts[..., None], x.astype(jnp.float32), 0.0).reshape(-1, x.shape[-1])
    second = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    return Moments(second, jnp.sum(jnp.abs(rows), axis=0), jnp.sum(counts, dtype=jnp.float32))
