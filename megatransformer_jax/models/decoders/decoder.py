"""What a decoder of images or sound is: the protocol, and what it is conditioned on."""

from typing import Any, Protocol, runtime_checkable

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key


@struct.dataclass
class Condition:
    """What the codas say about N media to be made.

    Attributes:
      context: up to C vectors for each.
      is_context: which of them there are. All False: nothing is said, an unconditional draw.
    """

    context: Float[Array, "N C D"]
    is_context: Bool[Array, "N C"]


@runtime_checkable
class MediaDecoder(Protocol):
    """Makes media from conditions. A Flax module; both methods are called on a bound one.

    `lengths` are frames of clips, [N], and None for images.
    """

    def loss(
        self,
        media: Float[Array, "N ..."],
        lengths: Int[Array, "N"] | None,
        condition: Condition,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "N"]]:
        """Terms of the loss of each medium, float32: 'loss' is what is minimised, others are its
        parts, for metrics. A medium's terms do not depend on the other media of the call.

        Args:
          media: images [N, height, width, C] or mel spectrograms [N, F, M].
          lengths: see above.
          condition: of each.
          key: of noise, time steps and dropped conditions.
        """

    def sample(
        self,
        condition: Condition,
        key: Key[Array, ""],
        lengths: Int[Array, "N"] | None = None,
        settings: Any = None,
    ) -> tuple[Float[Array, "N ..."], Int[Array, "N"] | None]:
        """Draws one medium per condition.

        Args:
          condition: of each.
          key: of the draw.
          lengths: frames to make; None: the decoder decides.
          settings: of the sampler (steps, guidance); None: the config's.

        Returns:
          Media, zeros beyond their lengths, and the lengths.
        """


def decoder_keys(key: Key[Array, ""], count: int) -> Key[Array, "N"]:
    """A key per medium, so that none depends on how many others there are."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jax.numpy.arange(count))
