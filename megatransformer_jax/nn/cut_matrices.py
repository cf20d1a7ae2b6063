"""Matrices that the mesh axis fsdp cuts, as a training step multiplies by them.

Every device multiplies its rows of the batch by a whole copy of the matrix, and finds the gradient
of its copy. Where XLA is left to sum these gradients it does so where the product stands, which may
be inside the loop over iterations; and on TPU it sums whole matrices on every device (all-reduce),
unless the parts that fsdp cuts are multiples of its tiles and the axis `data` has one device.

Here the copies are an axis of an array, which is cut over the devices. So nothing is summed until
we do it: once per matrix and step, in the compute type, by one reduce-scatter over fsdp and a sum
of the parts over `data`. That moves half the bytes of an all-reduce.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from megatransformer_jax.sharding.rules import Sharder

# Modules, and matrices in them, that are read by `multiply`, `einsum` and `take_rows` alone.
_MODULES = ("embedding", "prelude", "core", "coda")
_OF_LAYERS = ("qkv", "output", "up", "down")
_OF_ADAPTERS = ("state_kernel", "embedding_kernel", "b_matrix")
_MATRICES = ("embedding", "head", *_OF_LAYERS, *_OF_ADAPTERS)
# The name of products for policies of `jax.checkpoint`, which take the axis of copies for a batch.
PRODUCT = "product_with_copies"


@struct.dataclass
class CutMatrix:
    """A matrix that layers read in place of a parameter which fsdp cuts.

    Attributes:
      array: the parameter, or with `is_copied` [G, *shape]: a copy for each of the G devices that
        rows of the batch are cut over.
      axes: logical names of the axes of the parameter, one of which fsdp cuts.
      sharder: with a mesh.
      is_copied: see `array`.
      view: the shape that layers multiply by. None: that of the parameter.
    """

    array: Any
    axes: tuple[str | None, ...] = struct.field(pytree_node=False)
    sharder: Sharder = struct.field(pytree_node=False)
    is_copied: bool = struct.field(pytree_node=False, default=False)
    view: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        shape: tuple[int, ...] = self.array.shape
        return shape[1:] if self.is_copied else shape

    @property
    def ndim(self) -> int:
        """Axes of the parameter."""
        return len(self.axes)

    def astype(self, dtype: Any) -> "CutMatrix":
        """The same matrix in another type, in which its gradients are summed too."""
        changed: CutMatrix = self.replace(array=self.array.astype(dtype))  # type: ignore[attr-defined]
        return changed

    def reshape(self, *shape: int) -> "CutMatrix":
        """The same matrix for products with a matrix of this shape."""
        known = math.prod(extent for extent in shape if extent != -1)
        whole = tuple(math.prod(self.shape) // known if n == -1 else n for n in shape)
        changed: CutMatrix = self.replace(view=whole)  # type: ignore[attr-defined]
        return changed

    def copied(self) -> "CutMatrix":
        """The same matrix with its copies made: once for all the products that follow."""
        if self.is_copied:
            return self
        array = _copy(self.array, self.sharder, self.axes)
        changed: CutMatrix = self.replace(array=array, is_copied=True)  # type: ignore[attr-defined]
        return changed

    def product(self, equation: str, x: Float[Array, "B *rows K"], **options: Any) -> jax.Array:
        """`jnp.einsum` of activations, each of whose rows is multiplied by its device's copy.

        Args:
          equation: of the activations and the matrix, without the letter z.
          x: B is a multiple of G.
          **options: as of `jnp.einsum`.
        """
        copies = self.copied().array
        if self.view is not None:
            copies = copies.reshape(len(copies), *self.view)
        operands, result = equation.split("->")
        left, right = operands.split(",")
        rows = _by_device(x, len(copies))
        product = jnp.einsum(f"z{left},z{right}->z{result}", rows, copies, **options)
        product = checkpoint_name(product, PRODUCT)
        return product.reshape(len(x), *product.shape[2:])

    def take(self, rows: Int[Array, "B T"]) -> Float[Array, "B T K"]:
        """Rows of a table."""
        copies = self.copied().array
        take = jax.vmap(functools.partial(jnp.take, axis=0))
        taken = take(copies, _by_device(rows, len(copies)))
        return taken.reshape(*rows.shape, copies.shape[-1])


def cut_matrices(params: Any, axes: Any, sharder: Sharder, num_rows: int) -> Any:
    """Parameters whose matrices in prelude, core, coda and embedding are `CutMatrix`es.

    Nothing changes where fsdp cuts nothing, nor for rows that cannot be cut over the batch's axes.

    Args:
      params: nested dicts of arrays.
      axes: the same with logical names per array.
      sharder: of the model that will read them.
      num_rows: of the batch.
    """
    if sharder.mesh is None or sharder.mesh.shape["fsdp"] == 1:
        return params
    if sharder.rules.batch is None or num_rows % sharder.ways("batch"):
        return params
    names = flatten_dict(axes)
    flat: Mapping[tuple[str, ...], Any] = flatten_dict(params)

    def read(path: tuple[str, ...], leaf: Any) -> Any:
        is_read_by_products = path[0] in _MODULES and path[-1] in _MATRICES
        if not is_read_by_products or not hasattr(leaf, "dtype") or leaf.ndim < 2:
            return leaf
        is_cut = "fsdp" in sharder.rules.spec(*names[path])
        return CutMatrix(leaf, names[path], sharder) if is_cut else leaf

    return unflatten_dict({path: read(path, leaf) for path, leaf in flat.items()})


def gather_matrix(weight: Any, axes: tuple[str | None, ...], sharder: Sharder) -> Any:
    """A parameter, whole on every fsdp device."""
    if isinstance(weight, CutMatrix):
        return weight.copied()
    return sharder.gather_params(weight, axes)


def _by_device(x: Any, num_devices: int) -> Any:
    """[B, ...] to [G, B/G, ...]: each device keeps the rows that it has."""
    return x.reshape(num_devices, x.shape[0] // num_devices, *x.shape[1:])


# ------------------------------------------------------------------------------
# Copies, and the sum of their gradients.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copy(array: jax.Array, sharder: Sharder, axes: tuple[str | None, ...]) -> jax.Array:
    """[*shape] to [G, *shape]."""
    whole = Sharder(sharder.mesh, sharder.rules.without("fsdp")).constrain(array, *axes)
    copies = jnp.broadcast_to(whole, (sharder.ways("batch"), *whole.shape))
    return jax.lax.with_sharding_constraint(
        copies, jax.sharding.NamedSharding(_mesh(sharder), _copies_spec(sharder, axes))
    )


def _copy_forward(
    array: jax.Array, sharder: Sharder, axes: tuple[str | None, ...]
) -> tuple[jax.Array, None]:
    return _copy(array, sharder, axes), None


def _sum_copies(
    sharder: Sharder, axes: tuple[str | None, ...], _: None, gradients: jax.Array
) -> tuple[jax.Array]:
    """The gradient of the parameter, cut as it is."""
    mesh, spec = _mesh(sharder), sharder.rules.spec(*axes)
    cut, ways = tuple(spec).index("fsdp"), mesh.shape["fsdp"]
    others = tuple(axis for axis in _batch_axes(sharder) if axis != "fsdp" and mesh.shape[axis] > 1)

    def reduce(copy: jax.Array) -> jax.Array:
        # As a matrix of parts that need not fill tiles: an axis in front is never part of a tile.
        by_part = jnp.moveaxis(copy[0], cut, 0)
        shape = (by_part.shape[0] // ways, *by_part.shape[1:])
        by_part = by_part.reshape(ways, shape[0], -1)
        part = jax.lax.psum_scatter(by_part, "fsdp", scatter_dimension=0)
        part = jax.lax.psum(part, others) if others else part
        return jnp.moveaxis(part.reshape(shape), 0, cut)

    summed = jax.shard_map(
        reduce, mesh=mesh, in_specs=_copies_spec(sharder, axes), out_specs=spec, check_vma=False
    )
    return (summed(gradients),)


_copy.defvjp(_copy_forward, _sum_copies)


def _copies_spec(sharder: Sharder, axes: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(_batch_axes(sharder), *sharder.rules.without("fsdp").spec(*axes))


def _batch_axes(sharder: Sharder) -> tuple[str, ...]:
    batch = sharder.rules.batch
    return batch if isinstance(batch, tuple) else (batch,) if batch is not None else ()


def _mesh(sharder: Sharder) -> jax.sharding.Mesh:
    assert sharder.mesh is not None  # `cut_matrices` makes no matrices without one.
    return sharder.mesh
