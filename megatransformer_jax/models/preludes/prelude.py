"""What an encoder of media is: the protocol, and what it returns."""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int


class Encoded(NamedTuple):
    """N media as vectors for the sequence.

    Attributes:
      embeddings: in the compute type, P places each; exact zeros where there is none.
      is_embedding: which of the places there are; the first ones of each medium.
    """

    embeddings: Float[Array, "N P D"]
    is_embedding: Bool[Array, "N P"]


@runtime_checkable
class Prelude(Protocol):
    """Encodes media. A Flax module, called on a bound one; needs the rng stream 'dropout' unless
    deterministic."""

    def __call__(
        self,
        media: Float[Array, "N ..."],
        lengths: Int[Array, "N"] | None,
        deterministic: bool,
    ) -> Encoded:
        """Encodes each medium by itself: no output depends on other media or on padding.

        Args:
          media: images [N, height, width, C] or mel spectrograms [N, F, M].
          lengths: frames of each clip, 0 for an unused slot; None for images.
          deterministic: no dropout.

        Raises:
          ValueError: if the shapes are not those of the config, or lengths are missing or too many.
        """
