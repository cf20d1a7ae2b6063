"""Matrices of 8 or 4 bits, and their products with activations.

A matrix of K inputs and N outputs is kept as whole numbers of 4 or 8 bits with a float32 scale per
output channel, or per output channel and group of inputs. Layers multiply by it with `multiply` or
`einsum` below, and need not know which kind of matrix they have.

Numbers become floating point a block of inputs at a time, inside a scan. A conversion of the whole
matrix does not depend on the state of the core, so XLA would move it in front of the loop over
iterations, and of the loop over tokens, and the program would hold the float copy that quantisation
was to avoid. Where activations are rounded too, whole numbers are multiplied by whole numbers, and
nothing is converted.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, Num

from megatransformer_jax.nn.cut_matrices import CutMatrix

# Collection that layers sow the inputs of their matrices into, by the names of the matrices; a
# calibration reads it.
PRODUCT_INPUTS = "product_inputs"
# The largest whole number of each width; symmetric, so that zero stays zero.
LARGEST = {8: 127, 4: 7}
# Inputs per block that becomes floating point at once, about; a matrix has four blocks or more.
_BLOCK = 256
_BLOCKS = 4
# XLA on CPU multiplies whole numbers fast only if there are several rows.
_MIN_ROWS = 2


@struct.dataclass
class QuantizedMatrix:
    """A matrix that layers read in place of a float32 parameter.

    Attributes:
      values: int8 [K, N]. Of 4 bits [ceil(K / 2), N]: input 2k is in the lower half of a byte and
        input 2k + 1 in the upper.
      scale: float32 [ceil(K / group), N]; the last group may be shorter.
      input_scale: float32 [K], what inputs are multiplied by first (AWQ). None: nothing.
      shape: of the parameter that it stands for.
      num_inputs: how many leading axes of `shape` are the input. 0: a table [N, K], whose rows are
        the outputs.
      bits: of a number, 8 or 4.
      group: inputs that share a scale.
      rounds_inputs: activations are rounded to int8 too, each row by its largest.
      dtype: of products.
    """

    values: Any
    scale: Any
    input_scale: Any
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    num_inputs: int = struct.field(pytree_node=False)
    bits: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    rounds_inputs: bool = struct.field(pytree_node=False, default=False)
    dtype: Any = struct.field(pytree_node=False, default=jnp.float32)

    @property
    def ndim(self) -> int:
        """Axes of the parameter."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Numbers of the parameter."""
        return math.prod(self.shape)

    @property
    def inputs(self) -> int:
        """K."""
        return matrix_sides(self.shape, self.num_inputs)[0]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Axes of the parameter that are the output."""
        return self.shape[self.num_inputs :] if self.num_inputs else self.shape[:1]

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def astype(self, dtype: Any) -> "QuantizedMatrix":
        """The same matrix with products of another type."""
        changed: QuantizedMatrix = self.replace(dtype=jnp.dtype(dtype))  # type: ignore[attr-defined]
        return changed

    def reshape(self, *shape: int) -> "QuantizedMatrix":
        """The same matrix as [K, N]; all that a layer asks for.

        Raises:
          ValueError: for any other shape.
        """
        sides = (self.inputs, self.size // self.inputs)
        if not self.num_inputs or tuple(shape) not in (sides, (-1, sides[1]), (sides[0], -1)):
            raise ValueError(f"a quantised matrix of shape {self.shape} has no shape {shape}")
        changed: Any = self.replace(shape=sides, num_inputs=1)  # type: ignore[attr-defined]
        return changed

    def dequantize(self) -> Float[Array, "..."]:
        """The matrix as float32, in the shape of the parameter."""
        matrix = unpack(self.values, self.bits, self.inputs).astype(jnp.float32)
        matrix = matrix * jnp.repeat(self.scale, self.group, axis=0)[: self.inputs]
        if self.input_scale is not None:
            matrix = matrix * self.input_scale[:, None]
        return (matrix if self.num_inputs else matrix.T).reshape(self.shape)

    def take(self, rows: Int[Array, "B T"]) -> Float[Array, "B T K"]:
        """Rows of a table."""
        picked = unpack(jnp.take(self.values, rows.ravel(), axis=1), self.bits, self.inputs)
        scale = jnp.take(self.scale, rows.ravel(), axis=1)
        found = picked.astype(jnp.float32) * jnp.repeat(scale, self.group, axis=0)[: self.inputs]
        if self.input_scale is not None:
            found = found * self.input_scale[:, None]
        return found.T.reshape(*rows.shape, self.inputs).astype(self.dtype)

    def times(self, x: Float[Array, "*rows K"], dtype: Any = None) -> jax.Array:
        """x W, [*rows, *outputs]; `dtype` is that of the result, None: that of products.

        Raises:
          ValueError: if the inputs are not K.
        """
        if x.shape[-1] != self.inputs:
            raise ValueError(f"{x.shape[-1]} inputs for a matrix of {self.inputs}")
        rows = x.reshape(-1, x.shape[-1])
        if self.input_scale is not None:
            rows = rows.astype(jnp.float32) * self.input_scale
        if self.rounds_inputs:
            result = _round_and_multiply(rows, self)
        else:
            result = _multiply_in_blocks(rows.astype(self.dtype), self)
        result = result.astype(self.dtype if dtype is None else dtype)
        return result.reshape(*x.shape[:-1], *self.output_shape)


def is_quantized_matrix(node: Any) -> bool:
    """Whether a node of a tree of parameters is such a matrix."""
    return isinstance(node, QuantizedMatrix)


def is_matrix_node(node: Any) -> bool:
    """Whether a node of a tree of parameters stands for an array that its module declares."""
    return isinstance(node, QuantizedMatrix | CutMatrix)


def matrix_sides(shape: tuple[int, ...], num_inputs: int) -> tuple[int, int]:
    """Inputs and outputs of a parameter of this shape; `num_inputs` as in `QuantizedMatrix`."""
    if not num_inputs:
        return math.prod(shape[1:]), shape[0]
    return math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])


# ------------------------------------------------------------------------------
# What layers call.


def record_input(module: nn.Module, name: str, x: Float[Array, "*rows K"]) -> None:
    """Sows the input of a module's matrix into `PRODUCT_INPUTS`, under the name of the matrix.

    Not while parameters are declared, when every collection is collected: other libraries, as the
    bridge to NNX, do not take two variables of one name.
    """
    if not module.is_initializing():
        module.sow(PRODUCT_INPUTS, name, x)


def multiply(x: Float[Array, "*rows K"], kernel: Any) -> Float[Array, "*rows N"]:
    """x W for a matrix [K, N]."""
    if isinstance(kernel, CutMatrix):
        return kernel.product("b...k,kn->b...n", x)
    return kernel.times(x) if isinstance(kernel, QuantizedMatrix) else x @ kernel


def einsum(equation: str, x: Float[Array, "*rows K"], kernel: Any, **options: Any) -> jax.Array:
    """`jnp.einsum` of activations, whose last axis is the input, and a matrix.

    Args:
      equation: the last axis of the first operand is the only one that it sums over, and the
        outputs stand in the order of the matrix.
      x: activations.
      kernel: the matrix.
      **options: as of `jnp.einsum`; `preferred_element_type` alone.
    """
    if isinstance(kernel, QuantizedMatrix):
        return kernel.times(x, options.get("preferred_element_type"))
    if isinstance(kernel, CutMatrix):
        return kernel.product(equation, x, **options)
    return jnp.einsum(equation, x, kernel, **options)


def take_rows(table: Any, rows: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table of embeddings."""
    if isinstance(table, QuantizedMatrix | CutMatrix):
        return table.take(rows)
    return jnp.take(table, rows, axis=0)


# ------------------------------------------------------------------------------
# Two numbers of 4 bits in a byte.


def pack(numbers: Int[Array, "K N"], bits: int) -> Int[Array, "K2 N"]:
    """int8 numbers as they are stored."""
    if bits == 8:
        return numbers
    padded = jnp.pad(numbers, ((0, numbers.shape[0] % 2), (0, 0)))
    low, high = padded[::2], padded[1::2]
    return (jnp.left_shift(high, 4) | (low & 0xF)).astype(jnp.int8)


def unpack(values: Int[Array, "K2 N"], bits: int, inputs: int) -> Int[Array, "K N"]:
    """The inverse of `pack`; `inputs` is K."""
    if bits == 8:
        return values
    return jnp.stack(_halves(values, bits), axis=1).reshape(-1, values.shape[1])[:inputs]


def _halves(values: Int[Array, "K2 N"], bits: int) -> list[Int[Array, "K2 N"]]:
    """The numbers of a block, as matrices that follow each other in the order of `_interleaved`."""
    if bits == 8:
        return [values]
    # Shifts of signed numbers keep the sign.
    return [jnp.right_shift(jnp.left_shift(values, 4), 4), jnp.right_shift(values, 4)]


# ------------------------------------------------------------------------------
# Products.


def _multiply_in_blocks(x: Float[Array, "R K"], matrix: QuantizedMatrix) -> Float[Array, "R N"]:
    """Weights become floating point block by block."""

    def step(
        values: jax.Array, scale: jax.Array, parts: list[jax.Array], total: jax.Array
    ) -> jax.Array:
        for numbers, inputs in zip(_halves(values, matrix.bits), parts, strict=True):
            grouped = numbers.reshape(len(scale), -1, numbers.shape[-1])
            weights = grouped.astype(jnp.float32) * scale[:, None]
            weights = weights.reshape(numbers.shape).astype(matrix.dtype)
            total += jnp.dot(inputs, weights, preferred_element_type=jnp.float32)
        return total

    total = jnp.zeros((x.shape[0], matrix.values.shape[1]), jnp.float32)
    return _over_blocks(x, matrix, block_inputs(matrix.inputs, matrix.group), step, total)


def _round_and_multiply(x: Float[Array, "R K"], matrix: QuantizedMatrix) -> Float[Array, "R N"]:
    """Whole numbers times whole numbers, one group of inputs after the other."""
    rows = x.shape[0]
    x = jnp.pad(x.astype(jnp.float32), ((0, max(_MIN_ROWS - rows, 0)), (0, 0)))
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    x_scale = jnp.where(largest == 0, 1.0, largest / LARGEST[8])
    x = jnp.round(x / x_scale).astype(jnp.int8)
    is_whole = len(matrix.scale) == 1

    def step(
        values: jax.Array, scale: jax.Array, parts: list[jax.Array], total: jax.Array
    ) -> jax.Array:
        products = [
            jnp.dot(inputs, numbers, preferred_element_type=jnp.int32)
            for numbers, inputs in zip(_halves(values, matrix.bits), parts, strict=True)
        ]
        product = sum(products[1:], products[0])
        return total + (product if is_whole else product.astype(jnp.float32) * scale)

    inputs, outputs = matrix.inputs, matrix.values.shape[1]
    if is_whole and matrix.bits == 8:
        block = inputs
    else:
        block = block_inputs(inputs, inputs) if is_whole else matrix.group
    total = jnp.zeros((x.shape[0], outputs), jnp.int32 if is_whole else jnp.float32)
    total = _over_blocks(x, matrix, block, step, total)
    scaled = total * matrix.scale if is_whole else total
    return (scaled * x_scale)[:rows]


def _over_blocks(
    x: Num[Array, "R K"], matrix: QuantizedMatrix, block: int, step: Any, total: Num[Array, "R N"]
) -> Num[Array, "R N"]:
    """Sums `step(values, scale, parts of x, total)` over blocks of inputs.

    Args:
      x: activations.
      matrix: the matrix.
      block: inputs per block: a divisor or a multiple of the group.
      step: adds a block's products.
      total: to begin with.
    """
    inputs, per_byte = matrix.inputs, 8 // matrix.bits
    count, rest = divmod(inputs, block)
    if count == 1 and not rest:
        parts = [x[:, part::per_byte] for part in range(per_byte)]
        return step(matrix.values, matrix.scale, _even(parts), total)
    stored, groups = block // per_byte, max(block // matrix.group, 1)

    def at(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        values = jax.lax.dynamic_slice_in_dim(matrix.values, index * stored, stored)
        first = index * block // matrix.group
        scale = jax.lax.dynamic_slice_in_dim(matrix.scale, first, groups)
        return step(values, scale, list(blocks[index]), total), None

    # [count, per byte, R, inputs of a part]
    blocks = x[:, : count * block].reshape(x.shape[0], count, stored, per_byte)
    blocks = blocks.transpose(1, 3, 0, 2)
    total, _ = jax.lax.scan(at, total, jnp.arange(count))
    if not rest:
        return total
    left = x[:, count * block :]
    parts = _even([left[:, part::per_byte] for part in range(per_byte)])
    # One group, or a part of one: `block_inputs` leaves no more.
    return step(matrix.values[count * stored :], matrix.scale[-1:], parts, total)


def _even(parts: list[jax.Array]) -> list[jax.Array]:
    """Parts of equal length: where a byte is half used, its upper half is zero."""
    missing = [parts[0].shape[1] - part.shape[1] for part in parts]
    return [jnp.pad(part, ((0, 0), (0, few))) for part, few in zip(parts, missing, strict=True)]


def block_inputs(inputs: int, group: int) -> int:
    """Inputs per block: even, a divisor or a multiple of `group`, and at most one group is left.

    Examples:
      >>> block_inputs(1024, 1024), block_inputs(1024, 64), block_inputs(128, 64)
      (256, 256, 32)
      >>> block_inputs(352, 352), block_inputs(352, 64)
      (88, 64)
    """
    wanted = min(_BLOCK, max(inputs // _BLOCKS, 2))
    if group <= wanted:
        whole = inputs // group
        fits = [n for n in range(1, wanted // group + 1) if whole % n == 0]
        return group * max(fits)
    smaller = [n for n in range(2, wanted + 1, 2) if group % n == 0]
    return max(smaller) if smaller else group
