"""Types that every layer shares: the batch, the model's output, the precision policy.

Letters of shapes, used in einsum strings and shape comments everywhere:
`B` batch, `T` query length, `S` key length, `D` model width, `N` query heads, `K` KV heads,
`G` = N/K, `H` head width, `F` feed-forward width, `V` vocabulary, `L` layers, `R` cache slots,
`M` mel bins, `P` patches, `C` channels.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp

# NumPy arrays as the data side makes them, JAX arrays once they are on the mesh.
HostOrDeviceArray = typing.Any


class Batch(typing.NamedTuple):
    """One batch for a text model. All arrays are [B, T]; targets are aligned, not shifted.

    `targets[b, t]` is what position t must predict. `segment_ids` are 1, 2, ... for the documents
    of a packed row and 0 for padding; attention never crosses segments. `positions` count from 0
    in each document. `loss_mask` is 1.0 where the position counts in the loss, else 0.0.
    """

    tokens: HostOrDeviceArray  # int32 [B, T]
    targets: HostOrDeviceArray  # int32 [B, T]
    loss_mask: HostOrDeviceArray  # float32 [B, T]
    segment_ids: HostOrDeviceArray  # int32 [B, T]
    positions: HostOrDeviceArray  # int32 [B, T]


class ModelOutput(typing.NamedTuple):
    """What a forward pass returns."""

    logits: jax.Array  # float32 [B, T, V]
    latent: jax.Array  # [B, T, D] core output after the final norm (prelude output if no core)


@dataclasses.dataclass(frozen=True)
class DTypePolicy:
    """Types by role. Parameters, norms, softmax, logits and losses stay float32."""

    param: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))
    compute: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))

    @classmethod
    def from_precision(cls, precision: str, platform: str) -> "DTypePolicy":
        """The policy for `train.precision` on a platform ('cpu', 'gpu', 'tpu')."""
        if precision == "auto":
            precision = "float32" if platform == "cpu" else "bfloat16"
        return cls(compute=jnp.dtype(precision))
