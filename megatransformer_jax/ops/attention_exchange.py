"""Attention over rows that are cut over devices (mesh axis `sequence`): what the devices exchange.

| exchange | what travels                                   | what it serves                      |
|----------|------------------------------------------------|-------------------------------------|
| heads    | queries, keys, values and outputs: each device | KV heads that divide by the devices |
|          | gets whole rows of a part of the heads, by     | of `tensor` x `sequence`; any       |
|          | all-to-all (Ulysses, arXiv 2309.14509)         | kernel                              |
| keys     | keys and values: each device gets those of all | any number of heads; splash and XLA |
|          | rows and keeps its own queries, by all-gather  |                                     |

Heads are exchanged where that is possible: less travels, and all devices have the same work under
any mask. Where keys are gathered under a causal mask, the last rows see the most keys; splash
evens this out by swapping half of the queries between devices (`swap_halves`).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from megatransformer_jax.sharding.rules import MeshAxes, Sharder

Exchange = Literal["none", "heads", "keys"]


def choose_exchange(
    sharder: Sharder, query_length: int, key_length: int, kv_heads: int
) -> Exchange:
    """What devices exchange for attention of T queries to S keys.

    Args:
      sharder: with the mesh whose axis of `length` cuts the rows.
      query_length: T, of all devices together.
      key_length: S.
      kv_heads: K, of all devices together.

    Returns:
      'none' where rows are whole, else 'heads' or 'keys', see above.
    """
    ways = sharder.ways("length")
    if ways == 1:
        return "none"
    divides = kv_heads % (sharder.ways("kv_heads") * ways) == 0
    return "heads" if divides and query_length % ways == key_length % ways == 0 else "keys"


# ------------------------------------------------------------------------------
# Heads.


def with_whole_rows(sharder: Sharder) -> Sharder:
    """The same mesh as arrays lie on it once heads are exchanged: heads take the cuts of rows."""
    return dataclasses.replace(sharder, rules=sharder.rules.with_whole_rows())


def rows_to_heads(array: Float[Array, "B T N H"], sharder: Sharder) -> Float[Array, "B T N H"]:
    """Lays an array that `sharder` cuts by rows out as `with_whole_rows` says."""
    axes = sharder.rules.length

    def local(part: Array) -> Array:
        return jax.lax.all_to_all(part, axes, split_axis=2, concat_axis=1, tiled=True)

    rows, heads = _specs(sharder)
    return jax.shard_map(local, mesh=sharder.mesh, in_specs=rows, out_specs=heads)(array)


def heads_to_rows(array: Float[Array, "B T N H"], sharder: Sharder) -> Float[Array, "B T N H"]:
    """The inverse of `rows_to_heads`, with the same sharder."""
    axes = sharder.rules.length

    def local(part: Array) -> Array:
        return jax.lax.all_to_all(part, axes, split_axis=1, concat_axis=2, tiled=True)

    rows, heads = _specs(sharder)
    return jax.shard_map(local, mesh=sharder.mesh, in_specs=heads, out_specs=rows)(array)


def _specs(sharder: Sharder) -> tuple[jax.sharding.PartitionSpec, jax.sharding.PartitionSpec]:
    names = ("batch", "length", "heads", None)
    return sharder.rules.spec(*names), with_whole_rows(sharder).rules.spec(*names)


# ------------------------------------------------------------------------------
# Keys. These run on one device's part, inside of `jax.shard_map`.


def gather_rows(part: Float[Array, "B T K H"], axes: MeshAxes) -> Float[Array, "B S K H"]:
    """The rows of all devices; gradients are summed in the array's type."""
    return jax.lax.all_gather(part, axes, axis=1, tiled=True)


def swap_halves(part: Array, axes: MeshAxes, ways: int) -> Array:
    """Exchanges the second half of this device's rows, [B, T, ...], with the device that is as far
    from the other end. Early rows meet late ones, so that all devices see as many keys in sum.

    Its own inverse.
    """
    first, second = jnp.split(part, 2, axis=1)
    pairs = [(index, ways - 1 - index) for index in range(ways)]
    return jnp.concatenate([first, jax.lax.ppermute(second, axes, pairs)], axis=1)


def swapped_rows(length: int, ways: int) -> np.ndarray:
    """Numbers of the rows that devices hold after `swap_halves`, device by device, int32 [T]."""
    rows = np.arange(length, dtype=np.int32).reshape(ways, 2, -1)
    rows[:, 1] = rows[::-1, 1].copy()
    return rows.reshape(-1)
