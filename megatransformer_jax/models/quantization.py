"""Rounds the matrices of a model to 8 or 4 bits: to the nearest, by GPTQ, or by AWQ.

A matrix is W [K, N]: y = x W. qwix finds scales and rounds (extra 'quantization'); what is special
here is what the methods are told about x, see `models/passes/calibration.py`.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.quantization import QUANTIZABLE, QuantizationConfig
from megatransformer_jax.extras import import_extra
from megatransformer_jax.models.adaptation import num_input_axes, output_axes
from megatransformer_jax.models.megatransformer import MegaTransformer, param_axes
from megatransformer_jax.models.passes.calibration import Moments, MomentsByPath
from megatransformer_jax.nn.quantized import QuantizedMatrix, is_quantized_matrix, pack

# ------------------------------------------------------------------------------
# Which matrices.


def quantized_paths(axes: Any, config: QuantizationConfig) -> tuple[str, ...]:
    """The paths of the matrices that the config includes, in the order of the tree.

    Args:
      axes: logical names of every axis, from `param_axes`.
      config: how the model is quantised.

    Raises:
      ConfigError: if a pattern matches nothing that can be quantised.
    """
    paths = list(flatten_dict(axes, sep="/"))
    able = [path for path in paths if any(re.search(known, path) for known in QUANTIZABLE)]
    found: set[str] = set()
    for pattern in config.include:
        matches = [path for path in paths if re.search(pattern, path)]
        if not set(matches) & set(able):
            problem = (
                f"no matrix that can be quantised, only {matches[0]}" if matches else "nothing"
            )
            raise ConfigError(
                "include", f"{pattern!r} matches {problem}; those that can be are {_shown(able)}."
            )
        found.update(set(matches) & set(able))
    return tuple(path for path in paths if path in found)


def _shown(paths: list[str]) -> str:
    more = f" and {len(paths) - 6} more" if len(paths) > 6 else ""
    return (", ".join(paths[:6]) or "none of this model") + more


# ------------------------------------------------------------------------------
# The whole model.


def quantize_weights(
    model: MegaTransformer,
    params: Any,
    config: QuantizationConfig,
    moments: MomentsByPath | None = None,
) -> Any:
    """The tree with a `QuantizedMatrix` in place of every matrix that the config includes.

    Args:
      model: the model.
      params: its float parameters.
      config: how.
      moments: of the inputs of every such matrix; only gptq and awq read them.

    Raises:
      ConfigError: if a pattern fits nothing that can be quantised, or qwix is not installed.
      ValueError: if the method needs moments and there are none, or a matrix is quantised already.
    """
    axes = param_axes(model)
    paths = quantized_paths(axes, config)
    names, weights = flatten_dict(axes, sep="/"), flatten_dict(params, sep="/")
    for path in paths:
        if is_quantized_matrix(weights[path]):
            raise ValueError(f"{path} is quantised already")
        of_inputs = None if moments is None else moments[path]
        weights[path] = quantize_matrix(weights[path], _num_inputs(names[path]), config, of_inputs)
    return unflatten_dict(weights, sep="/")


def dequantize_weights(params: Any) -> Any:
    """The tree with float32 matrices in place of quantised ones."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if is_quantized_matrix(leaf) else leaf,
        params,
        is_leaf=is_quantized_matrix,
    )


def is_quantized_model(params: Any) -> bool:
    """Whether a matrix of the tree is quantised."""
    return any(map(is_quantized_matrix, jax.tree.leaves(params, is_leaf=is_quantized_matrix)))


def _num_inputs(axes: tuple[str | None, ...]) -> int:
    """As in `QuantizedMatrix`: 0 for a table, whose rows are the outputs."""
    inputs = num_input_axes(axes)
    assert inputs is not None  # QUANTIZABLE names matrices alone.
    return 0 if output_axes(axes) == (0,) else inputs


# ------------------------------------------------------------------------------
# One matrix.


def quantize_matrix(
    weight: Float[Array, "..."],
    num_inputs: int,
    config: QuantizationConfig,
    moments: Moments | None = None,
) -> QuantizedMatrix:
    """Rounds one matrix.

    Args:
      weight: in the shape of its parameter.
      num_inputs: as in `QuantizedMatrix`.
      config: how.
      moments: of its inputs; only gptq and awq read them.

    Raises:
      ValueError: if the method needs moments and there are none.
    """
    shape = weight.shape
    matrix = jnp.asarray(weight, jnp.float32).reshape(
        (shape[0], -1) if not num_inputs else (_product(shape[:num_inputs]), -1)
    )
    matrix = matrix if num_inputs else matrix.T
    group, bits, input_scale = config.group_of(matrix.shape[0]), config.bits, None
    if config.method != "rtn" and moments is None:
        raise ValueError(f"method={config.method!r} needs the moments of the matrix's inputs")
    match config.method:
        case "rtn":
            numbers, scale = round_to_nearest(matrix, bits, group)
        case "gptq":
            assert moments is not None  # Asked above.
            numbers, scale = round_by_gptq(matrix, moments.second, bits, group)
        case "awq":
            assert moments is not None
            mean = moments.absolute / jnp.maximum(moments.count, 1)
            numbers, scale, input_scale = round_by_awq(matrix, mean, bits, group)
        case _:
            raise ValueError(f"unknown method {config.method!r}; known: rtn, gptq, awq")
    return QuantizedMatrix(
        pack(numbers, bits),
        scale,
        input_scale,
        shape,
        num_inputs,
        bits,
        group,
        config.activations == "int8",
    )


def _product(sides: tuple[int, ...]) -> int:
    result = 1
    for side in sides:
        result *= side
    return result


Rounded = tuple[Int[Array, "K N"], Float[Array, "groups N"]]


@functools.partial(jax.jit, static_argnums=(1, 2))
def round_to_nearest(matrix: Float[Array, "K N"], bits: int, group: int) -> Rounded:
    """Whole numbers and scales: the largest entry of a group becomes the largest number."""
    padded = _whole_groups(matrix, group)
    rounded = _qwix().quantize(padded, _qtype(bits), channelwise_axes=(1,), tiled_axes={0: group})
    return rounded.qvalue[: matrix.shape[0]].astype(jnp.int8), rounded.scale


# Rows that are rounded before the rest of the matrix is corrected, where no group says.
_GPTQ_BLOCK = 128
# Added to the diagonal of the second moments, as a part of its mean: that of the authors.
_DAMPING = 0.01


@functools.partial(jax.jit, static_argnums=(2, 3))
def round_by_gptq(
    matrix: Float[Array, "K N"], second: Float[Array, "K K"], bits: int, group: int
) -> Rounded:
    """Rounds input by input; what is not rounded yet takes up the error (arXiv 2210.17323).

    The error of y = x W is measured in the metric of the inputs' second moments. The scale of a
    group is taken when its turn comes, after the corrections so far. The same as qwix's
    `gptq_core.quantize_weight` with blocks of a group, which compiles a program per input.

    Args:
      matrix: W.
      second: the sum of x x^T, or any multiple of it.
      bits: of a number.
      group: inputs that share a scale.
    """
    inputs = matrix.shape[0]
    block = group if group < inputs else min(_GPTQ_BLOCK, inputs + inputs % 2)
    is_whole = group >= inputs
    whole_scale = _scale_of(_whole_groups(matrix, group), bits) if is_whole else None
    weights, metric = _prepare_gptq(matrix, second, block)
    largest, smallest = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))

    def round_block(weights: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        rows = jax.lax.dynamic_slice_in_dim(weights, start, block)
        across = jax.lax.dynamic_slice_in_dim(metric, start, block)
        within = jax.lax.dynamic_slice_in_dim(across, start, block, axis=1)
        scale = _scale_of(rows, bits) if whole_scale is None else whole_scale

        def round_row(index: jax.Array, carry: Any) -> Any:
            rows, numbers, errors = carry
            number = jnp.clip(jnp.round(rows[index] / scale), smallest, largest)
            error = (rows[index] - number * scale) / within[index, index]
            rows = rows - jnp.outer(within[index], error)
            return rows, numbers.at[index].set(number), errors.at[index].set(error)

        zeros = jnp.zeros_like(rows)
        _, numbers, errors = jax.lax.fori_loop(0, block, round_row, (rows, zeros, zeros))
        return weights - across.T @ errors, (numbers.astype(jnp.int8), scale)

    starts = jnp.arange(0, weights.shape[0], block)
    _, (numbers, scales) = jax.lax.scan(round_block, weights, starts)
    numbers = numbers.reshape(weights.shape)[:inputs]
    return numbers, scales[:1] if is_whole else scales


def _prepare_gptq(matrix: jax.Array, second: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The matrix with whole blocks, and U, upper triangular, with U^T U the inverse metric."""
    second = second.astype(jnp.float32)
    diagonal = jnp.diag(second)
    is_dead = diagonal == 0
    matrix = jnp.where(is_dead[:, None], 0.0, matrix)
    second = second + jnp.diag(jnp.where(is_dead, 1.0, _DAMPING * jnp.mean(diagonal)))
    inverse = jax.scipy.linalg.cho_solve(
        (jnp.linalg.cholesky(second), True), jnp.eye(second.shape[0])
    )
    upper = jnp.linalg.cholesky(inverse, upper=True)
    missing = -matrix.shape[0] % block
    # What is added multiplies nothing and corrects nothing.
    upper = jax.scipy.linalg.block_diag(upper, jnp.eye(missing)) if missing else upper
    return jnp.pad(matrix, ((0, missing), (0, 0))), upper


@functools.partial(jax.jit, static_argnums=(2, 3))
def round_by_awq(
    matrix: Float[Array, "K N"], mean_absolute: Float[Array, "K"], bits: int, group: int
) -> tuple[Int[Array, "K N"], Float[Array, "groups N"], Float[Array, "K"]]:
    """Multiplies inputs of large activations by a factor before rounding (arXiv 2306.00978).

    Args:
      matrix: W.
      mean_absolute: the mean |x| of each input.
      bits: of a number.
      group: inputs that share a scale.

    Returns:
      Whole numbers, scales, and what the inputs are to be multiplied by.
    """
    core = import_extra("qwix.contrib.awq_core", "quantization", "method='awq'")
    qarray = import_extra("qwix._src.core.qarray", "quantization", "method='awq'")
    # qwix has the outputs first.
    how = qarray.HowToQuantize(qtype=_qtype(bits), channelwise_axes=(0,), tiled_axes={1: group})
    padded = _whole_groups(matrix, group)
    mean = jnp.pad(mean_absolute, (0, len(padded) - len(matrix)), mode="edge")
    rounded, factors = core.quantize_weight(padded.T, mean, how)
    numbers = rounded.qvalue.T[: len(matrix)].astype(jnp.int8)
    return numbers, rounded.scale.T, 1 / factors[0, : len(matrix)]


def _whole_groups(matrix: jax.Array, group: int) -> jax.Array:
    return jnp.pad(matrix, ((0, -matrix.shape[0] % group), (0, 0)))


def _scale_of(rows: jax.Array, bits: int) -> jax.Array:
    """[N], that of all rows together."""
    scale: jax.Array = _qwix().quantize(rows, _qtype(bits), channelwise_axes=(1,)).scale
    return scale[0]


def _qtype(bits: int) -> Any:
    return {8: jnp.int8, 4: jnp.int4}[bits]


def _qwix() -> Any:
    return import_extra("qwix", "quantization", "quantising weights")
