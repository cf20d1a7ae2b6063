"""Matrices that the mesh axis fsdp cuts, as a training step multiplies by them.

Every device multiplies its rows of the batch by a whole copy of the matrix, and finds the gradient
of its copy. Where XLA is left to sum these gradients it does so where the product stands, which may
be inside the loop over iterations; and on TPU it sums whole matrices on every device (all-reduce),
unless the parts that fsdp cuts are multiples of its tiles and the axis `data` has one device.

Here the copies are an axis of an array, which is cut over the devices. So nothing is summed until
we do it: once per matrix and step, in the compute type, by one reduce-scatter over fsdp and a sum
of the parts over `data`. That moves half the bytes of an all-reduce.

With micro-batches the sum over `data` waits for the last of them (`Spread`): until then each part
of the mesh along `data` adds up gradients of its own, which takes no more memory. The
reduce-scatter over fsdp does not wait, because gradients of whole matrices would have to be kept.
"""

import dataclasses
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
        rows of the batch are cut over. With `is_spread` [E, *shape]: a copy for each of the E parts
        of the mesh that differ in other axes of the batch than fsdp, which cuts each copy.
      axes: logical names of the axes of the parameter.
      sharder: with a mesh.
      is_copied: see `array`.
      is_spread: see `array`.
      view: the shape that layers multiply by. None: that of the parameter.
    """

    array: Any
    axes: tuple[str | None, ...] = struct.field(pytree_node=False)
    sharder: Sharder = struct.field(pytree_node=False)
    is_copied: bool = struct.field(pytree_node=False, default=False)
    is_spread: bool = struct.field(pytree_node=False, default=False)
    view: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        shape: tuple[int, ...] = self.array.shape
        return shape[1:] if self.is_copied or self.is_spread else shape

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
        array = _copy(self.array, self.sharder, self.axes, self.is_spread)
        if _fills_heads(self.axes, self.sharder):
            array = _fill_heads(array, self.axes, self.sharder, _batch_axes(self.sharder))
        changed: CutMatrix = self.replace(  # type: ignore[attr-defined]
            array=array, is_copied=True, is_spread=False
        )
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
        is_cut = _is_read_by_products(path, leaf) and "fsdp" in sharder.rules.spec(*names[path])
        return CutMatrix(leaf, names[path], sharder) if is_cut else leaf

    return unflatten_dict({path: read(path, leaf) for path, leaf in flat.items()})


def _is_read_by_products(path: tuple[str, ...], leaf: Any) -> bool:
    """Whether a parameter is a matrix, as an array, that only functions of this file read."""
    is_named = path[0] in _MODULES and path[-1] in _MATRICES
    return is_named and hasattr(leaf, "dtype") and leaf.ndim > 1


def gather_matrix(weight: Any, axes: tuple[str | None, ...], sharder: Sharder) -> Any:
    """A parameter, whole on every fsdp device."""
    if isinstance(weight, CutMatrix):
        return weight.copied()
    return fill_heads(sharder.gather_params(weight, axes), axes, sharder)


def fill_heads(weight: Any, axes: tuple[str | None, ...], sharder: Sharder) -> Any:
    """A matrix of attention for the heads that devices compute, cut over these heads.

    The same matrix unless heads are filled up (`Sharder.heads`) and it has not been
    done yet. Where a loop follows, `gather_matrix` does it before.
    """
    if isinstance(weight, CutMatrix):
        return weight.copied() if _fills_heads(axes, sharder) else weight
    if not _fills_heads(axes, sharder):
        return weight
    array = _fill_heads(weight[None], axes, sharder, ())
    return CutMatrix(array, axes, sharder, is_copied=True)


def _fills_heads(axes: tuple[str | None, ...], sharder: Sharder) -> bool:
    return sharder.fills_heads and "head_width" in axes


def _fill_heads(
    copies: jax.Array, axes: tuple[str | None, ...], sharder: Sharder, over: tuple[str, ...]
) -> jax.Array:
    """[G, *shape], cut along the width of a head, to the same with more heads, cut along these.

    Args:
      copies: whole on every fsdp device.
      axes: logical names of `shape`.
      sharder: with a mesh.
      over: mesh axes that G is cut over.
    """
    copies = sharder.fill_heads(copies, 1 + axes.index("head_rows"))
    computed = {"head_rows": "heads", "head_width": None}
    names = [computed.get(name, name) if name else None for name in axes]
    spec = sharder.rules.without("fsdp").spec(*names)
    return _place(copies, sharder, PartitionSpec(over or None, *spec))


def _by_device(x: Any, num_devices: int) -> Any:
    """[B, ...] to [G, B/G, ...]: each device keeps the rows that it has."""
    return x.reshape(num_devices, x.shape[0] // num_devices, *x.shape[1:])


# ------------------------------------------------------------------------------
# Micro-batches, whose gradients are summed over the devices after the last of them.


@dataclasses.dataclass(frozen=True)
class Spread:
    """Which matrices have copies along the axes of the batch other than fsdp, and how.

    Copies are arrays, so that gradients of micro-batches can be added up. Matrices that are left
    out are summed over the devices once per micro-batch.

    Attributes:
      sharder: of the model.
      axes: logical names of the axes of each matrix, by its path.
    """

    sharder: Sharder
    axes: Mapping[tuple[str, ...], tuple[str | None, ...]]

    @classmethod
    def of(cls, params: Any, axes: Any, sharder: Sharder, num_rows: int) -> "Spread":
        """All matrices for which that saves something.

        Args:
          params: nested dicts of arrays, None for those that have no gradients.
          axes: the same with logical names per array.
          sharder: of the model that will read them.
          num_rows: of a micro-batch.
        """
        found = {}
        if sharder.mesh is not None and not num_rows % sharder.ways("batch"):
            names, fsdp = flatten_dict(axes), sharder.mesh.shape["fsdp"]
            if sharder.ways("batch") > fsdp:
                flat: Mapping[tuple[str, ...], Any] = flatten_dict(params)
                found = {
                    path: names[path]
                    for path, leaf in flat.items()
                    if _is_read_by_products(path, leaf)
                    if "fsdp" in sharder.rules.spec(*names[path])
                }
        return cls(sharder, found)

    def copies(self, params: Any) -> Any:
        """Parameters with [E, *shape] in place of these matrices. Nothing moves."""

        def spread(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
            copies = jnp.broadcast_to(array, (self._count, *array.shape))
            return _place(copies, self.sharder, _spread_spec(self.sharder, axes))

        return self._map(spread, params)

    def matrices(self, copies: Any) -> Any:
        """The same as `CutMatrix`es, for the model."""
        return self._map(
            lambda array, axes: CutMatrix(array, axes, self.sharder, is_spread=True), copies
        )

    def summed(self, gradients: Any, dtype: Any) -> Any:
        """Gradients of the parameters from those of `copies`, summed in a type."""

        def sum_up(copies: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
            total = jax.shard_map(
                lambda copy: jax.lax.psum(copy[0], _outer_axes(self.sharder)),
                mesh=_mesh(self.sharder),
                in_specs=_spread_spec(self.sharder, axes),
                out_specs=self.sharder.rules.spec(*axes),
                check_vma=False,
            )(copies.astype(dtype))
            return total.astype(copies.dtype)

        return self._map(sum_up, gradients)

    @property
    def _count(self) -> int:
        return self.sharder.ways("batch") // _mesh(self.sharder).shape["fsdp"]

    def _map(self, function: Any, params: Any) -> Any:
        if not self.axes:
            return params
        flat: Mapping[tuple[str, ...], Any] = flatten_dict(params)
        return unflatten_dict(
            {
                path: function(leaf, self.axes[path]) if path in self.axes else leaf
                for path, leaf in flat.items()
            }
        )


# ------------------------------------------------------------------------------
# Copies, and the sum of their gradients.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _copy(
    array: jax.Array, sharder: Sharder, axes: tuple[str | None, ...], is_spread: bool
) -> jax.Array:
    """[*shape], or [E, *shape], to [G, *shape]."""
    gathered, count = sharder.rules.without("fsdp"), sharder.ways("batch")
    # As it is cut, and then whole: otherwise the compiler may gather before it rounds.
    if is_spread:
        cut = _place(array, sharder, _spread_spec(sharder, axes))
        spec = PartitionSpec(_outer_axes(sharder), *gathered.spec(*axes))
        whole = _place(cut, sharder, spec)
        # The last axis of the batch is fsdp.
        shape = (len(whole), count // len(whole), *whole.shape[1:])
        copies = jnp.broadcast_to(whole[:, None], shape).reshape(count, *whole.shape[1:])
    else:
        cut = sharder.constrain(array, *axes)
        whole = Sharder(sharder.mesh, gathered).constrain(cut, *axes)
        copies = jnp.broadcast_to(whole, (count, *whole.shape))
    return _place(copies, sharder, _copies_spec(sharder, axes))


def _copy_forward(
    array: jax.Array, sharder: Sharder, axes: tuple[str | None, ...], is_spread: bool
) -> tuple[jax.Array, None]:
    return _copy(array, sharder, axes, is_spread), None


def _sum_copies(
    sharder: Sharder,
    axes: tuple[str | None, ...],
    is_spread: bool,
    _: None,
    gradients: jax.Array,
) -> tuple[jax.Array]:
    """The gradient of the parameter, cut as it is; or of each of its spread copies."""
    mesh, spec = _mesh(sharder), sharder.rules.spec(*axes)
    cut, ways = tuple(spec).index("fsdp"), mesh.shape["fsdp"]
    others = () if is_spread else _outer_axes(sharder)

    def reduce(copy: jax.Array) -> jax.Array:
        # As a matrix of parts that need not fill tiles: an axis in front is never part of a tile.
        by_part = jnp.moveaxis(copy[0], cut, 0)
        shape = (by_part.shape[0] // ways, *by_part.shape[1:])
        by_part = by_part.reshape(ways, shape[0], -1)
        part = by_part[0]
        if ways > 1:
            part = jax.lax.psum_scatter(by_part, "fsdp", scatter_dimension=0)
        part = jax.lax.psum(part, others) if others else part
        part = jnp.moveaxis(part.reshape(shape), 0, cut)
        return part[None] if is_spread else part

    summed = jax.shard_map(
        reduce,
        mesh=mesh,
        in_specs=_copies_spec(sharder, axes),
        out_specs=_spread_spec(sharder, axes) if is_spread else spec,
        check_vma=False,
    )
    return (summed(gradients),)


_copy.defvjp(_copy_forward, _sum_copies)


def _copies_spec(sharder: Sharder, axes: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(_batch_axes(sharder), *sharder.rules.without("fsdp").spec(*axes))


def _spread_spec(sharder: Sharder, axes: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(_outer_axes(sharder), *sharder.rules.spec(*axes))


def _place(array: jax.Array, sharder: Sharder, spec: PartitionSpec) -> jax.Array:
    sharding = jax.sharding.NamedSharding(_mesh(sharder), spec)
    return jax.lax.with_sharding_constraint(array, sharding)


def _outer_axes(sharder: Sharder) -> tuple[str, ...]:
    """Axes of the batch with several devices, but fsdp."""
    sizes = _mesh(sharder).shape
    return tuple(axis for axis in _batch_axes(sharder) if axis != "fsdp" and sizes[axis] > 1)


def _batch_axes(sharder: Sharder) -> tuple[str, ...]:
    batch = sharder.rules.batch
    return batch if isinstance(batch, tuple) else (batch,) if batch is not None else ()


def _mesh(sharder: Sharder) -> jax.sharding.Mesh:
    assert sharder.mesh is not None  # `cut_matrices` makes no matrices without one.
    return sharder.mesh
