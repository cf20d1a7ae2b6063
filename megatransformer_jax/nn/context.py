"""What every layer of one forward pass shares."""

from flax import struct
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.nn.loop_parameters import Loop
from megatransformer_jax.ops.cached_attention import CachedRows
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import RotaryTable


@struct.dataclass
class CachedPass:
    """How the layers of one stack read a cache while T new tokens pass through them.

    Each attention layer sows its new keys and values, [B, K, T, P], as `pairs` into the
    collection `NEW_ROWS`; whoever runs the pass writes them to the cache.

    Attributes:
      rows: the cache; its `entry` is that of the stack's first layer.
      query_positions: places of the new tokens; -1 for padding.
      key_positions: the same, with -1 also for new tokens that must not be seen.
      is_active: new tokens that still iterate; the others offer `frozen`. None: all.
      frozen: pairs that inactive tokens offer in place of new ones.
      is_first: the cache is empty, so the new tokens see each other only, through
        `LayerContext.mask`, and any attention kernel can serve.
    """

    rows: CachedRows
    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B T"]
    is_active: Bool[Array, "B T"] | None = None
    frozen: Float[Array, "L B K T P"] | None = None
    is_first: bool = struct.field(pytree_node=False, default=False)


# Collection that attention layers sow their new keys and values into.
NEW_ROWS = "new_rows"


@struct.dataclass
class LayerContext:
    """Computed once per forward pass and read by every layer and every iteration.

    Attributes:
      mask: who may attend to whom.
      rotary: cosine and sine table of the positions, None unless positions are rotary.
      alibi_slopes: [N], None unless positions are ALiBi.
      head_mask: factor on every head's output for the layers of one stack, [L, N], or None.
      deterministic: no dropout.
      cached: set where the pass reads a cache.
      value_embeddings: rows of the pass's tokens for the layers of each stack that have value
        embeddings, by the stack's name (nn/embedding.py). None if the model has none.
      value_embedding: the rows of one layer, which its stack hands to it.
      loop: which iteration the core's layers run in; None where nothing depends on it.
    """

    mask: AttentionMask
    rotary: RotaryTable | None = None
    alibi_slopes: Float[Array, "N"] | None = None
    head_mask: Float[Array, "L N"] | None = None
    deterministic: bool = struct.field(pytree_node=False, default=True)
    cached: CachedPass | None = None
    value_embeddings: dict[str, Float[Array, "_ B T K H"]] | None = None
    value_embedding: Float[Array, "B T K H"] | None = None
    loop: Loop | None = None
