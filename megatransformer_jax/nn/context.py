"""What every layer of one forward pass shares."""

from flax import struct
from jaxtyping import Array, Float

from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import RotaryTable


@struct.dataclass
class LayerContext:
    """Computed once per forward pass and read by every layer and every iteration.

    Attributes:
      mask: who may attend to whom.
      rotary: cosine and sine table of the positions, None unless positions are rotary.
      alibi_slopes: [N], None unless positions are ALiBi.
      head_mask: factor on every head's output for the layers of one stack, [L, N], or None.
      deterministic: no dropout.
    """

    mask: AttentionMask
    rotary: RotaryTable | None = None
    alibi_slopes: Float[Array, "N"] | None = None
    head_mask: Float[Array, "L N"] | None = None
    deterministic: bool = struct.field(pytree_node=False, default=True)
