"""THE table from logical axis to mesh axis, for parameters and for activations.

Parameters and activations name their axes by meaning ('embed', 'heads', 'batch', ...). Only this
file says which mesh axis shards which meaning.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None
MESH_AXES = ("data", "fsdp", "tensor", "sequence")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """One field per logical axis; its value is the mesh axis (or axes) that shards it."""

    # Parameters. fsdp cuts the width of every matrix, tensor cuts heads, hidden and vocabulary.
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    head_rows: MeshAxes = "tensor"
    # Where tensor does not divide the heads, parameters are cut along the width of a head instead.
    head_width: MeshAxes = None
    mlp: MeshAxes = "tensor"
    # Rows of PEER's tables. A lookup sums what the devices find among their own rows.
    experts: MeshAxes = "tensor"
    # Width of the core where a matrix maps it to itself: already cut along its other axis.
    core_out: MeshAxes = None
    # Activations.
    batch: MeshAxes = ("data", "fsdp")
    length: MeshAxes = "sequence"
    kv_heads: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"

    def spec(self, *logical_axes: str | None) -> PartitionSpec:
        """Mesh axes for an array whose axes have these logical names (None: not sharded)."""
        return PartitionSpec(*(None if name is None else self._axis(name) for name in logical_axes))

    def with_whole_heads(self) -> "ShardingRules":
        """The same table with parameters cut along the width of a head in place of the heads."""
        return dataclasses.replace(self, head_rows=None, head_width=self.head_rows)

    def without(self, mesh_axis: str) -> "ShardingRules":
        """The same table with one mesh axis unused: what parameters look like once gathered."""
        return ShardingRules(
            **{
                field.name: _drop(getattr(self, field.name), mesh_axis)
                for field in dataclasses.fields(self)
            }
        )

    def with_whole_rows(self) -> "ShardingRules":
        """The same table with heads cut over the axes of `length` as well, and rows not cut: what
        attention looks like once devices have exchanged heads for rows."""
        return dataclasses.replace(
            self,
            heads=_join(self.heads, self.length),
            kv_heads=_join(self.kv_heads, self.length),
            length=None,
        )

    def _axis(self, name: str) -> MeshAxes:
        if name not in self.__dataclass_fields__:
            known = ", ".join(self.__dataclass_fields__)
            raise ValueError(f"unknown logical axis {name!r}; known: {known}")
        return getattr(self, name)


def _drop(axes: MeshAxes, mesh_axis: str) -> MeshAxes:
    if isinstance(axes, tuple):
        return tuple(axis for axis in axes if axis != mesh_axis)
    return None if axes == mesh_axis else axes


def _join(outer: MeshAxes, inner: MeshAxes) -> tuple[str, ...]:
    return _names(outer) + _names(inner)


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


@dataclasses.dataclass(frozen=True)
class Sharder:
    """Places arrays on a mesh by their logical axes. Without a mesh it leaves them alone.

    Attributes:
      mesh: None for one device.
      rules: the table.
      heads: key/value heads of the model, and how many devices compute. There are more of these,
        filled up with zeros, where the mesh does not divide the model's (`make_sharder`). Query
        heads are filled up by the same factor.
    """

    mesh: Mesh | None = None
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)
    heads: tuple[int, int] = (1, 1)

    def sharding(self, *logical_axes: str | None) -> NamedSharding:
        """The sharding of an array with these axes. Needs a mesh."""
        if self.mesh is None:
            raise ValueError("a Sharder without a mesh has no shardings; construct it with one")
        return NamedSharding(self.mesh, self.rules.spec(*logical_axes))

    def ways(self, logical_axis: str) -> int:
        """Parts that the table cuts an axis of this name into; 1 without a mesh."""
        if self.mesh is None:
            return 1
        axes = self.rules.spec(logical_axis)[0]
        return math.prod(self.mesh.shape[name] for name in _names(axes))

    def fill_heads(self, array: jax.Array, axis: int = 0, value: float = 0.0) -> jax.Array:
        """The array with its axis of heads filled up, see `heads`."""
        missing = self.num_heads(array.shape[axis]) - array.shape[axis]
        if not missing:
            return array
        widths = [(0, missing if place == axis else 0) for place in range(array.ndim)]
        return jnp.pad(array, widths, constant_values=value)

    def num_heads(self, count: int) -> int:
        """How many query or key/value heads devices compute for `count` of the model."""
        heads, computed = self.heads
        return count * computed // heads

    @property
    def fills_heads(self) -> bool:
        """Whether devices compute more heads than the model has."""
        return self.heads[0] != self.heads[1]

    def constrain(self, array: jax.Array, *logical_axes: str | None) -> jax.Array:
        """Asks the compiler to lay `array` out by the table (identity without a mesh)."""
        if self.mesh is None:
            return array
        if array.ndim != len(logical_axes):
            raise ValueError(f"shape {array.shape} does not have the axes {logical_axes}")
        return jax.lax.with_sharding_constraint(array, self.sharding(*logical_axes))

    def gather_params(self, params: Any, logical_axes: Any) -> Any:
        """Lays `params` out as the table says but without cuts over fsdp.

        Called on the core's weights before the recurrence, so that they are gathered once per
        step and not once per iteration; the transpose reduces their gradients once as well.

        Args:
          params: pytree of arrays.
          logical_axes: the same tree with a tuple of logical names per array.
        """
        if self.mesh is None:
            return params
        gathered = Sharder(self.mesh, self.rules.without("fsdp"))
        return jax.tree.map(
            lambda array, axes: gathered.constrain(array, *axes),
            params,
            logical_axes,
            is_leaf=lambda node: isinstance(node, jax.Array),
        )
