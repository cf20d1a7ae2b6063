"""A model of one medium as training sees it."""

from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Key


@runtime_checkable
class MediumModel(Protocol):
    """Parameters and the loss that trains them. Implementations are frozen."""

    def init(self, key: Key[Array, ""]) -> Any:
        """Fresh parameters, float32."""

    def axes(self) -> Any:
        """Logical axis names of every parameter, in the tree of `init`."""

    def loss(
        self, params: Any, batch: Any, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        """The mean over the rows of the batch, and further means by the name of their metric."""
