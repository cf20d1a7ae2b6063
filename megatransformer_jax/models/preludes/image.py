"""The encoder of images: a vision transformer."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.codas.coda import side_context
from megatransformer_jax.models.preludes.media_embedding import MediaEmbedding
from megatransformer_jax.models.preludes.media_stack import media_stack
from megatransformer_jax.models.preludes.prelude import Encoded
from megatransformer_jax.nn.embedding import patchify
from megatransformer_jax.nn.parameters import vector, weight_init
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


class ImagePrelude(nn.Module):
    """Patches, linear, plus a learned vector per row and one per column of patches, then layers
    that are not causal (ViT, arXiv 2010.11929). See `Prelude`."""

    config: ModelConfig
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    @nn.compact
    def __call__(
        self,
        media: Float[Array, "N height width C"],
        lengths: Int[Array, "N"] | None,
        deterministic: bool,
    ) -> Encoded:
        """Encodes images; see `Prelude`."""
        image = self.config.image
        if media.shape[1:] != image.shape:
            raise ValueError(
                f"images have shape {media.shape[1:]}, but model.image says {image.shape} (height, "
                "width, channels); change either."
            )
        if lengths is not None:
            raise ValueError("lengths are given, but images have none; pass None.")
        patches = patchify(media, image.patch_size)
        embed = MediaEmbedding(self.config, self.policy, name="embedding")
        x = embed(patches, self._positions(), deterministic)
        is_patch = jnp.ones(x.shape[:2], bool)
        layers = media_stack(
            self.config, image.prelude_layers, self.policy, self.sharder, self.platform
        )
        return Encoded(layers(x, side_context(self.config, is_patch, deterministic)), is_patch)

    def _positions(self) -> Float[Array, "P D"]:
        image, width = self.config.image, self.config.width
        rows, columns = image.height // image.patch_size, image.width // image.patch_size
        init = weight_init(self.config, width).embedding
        axes = (None, "embed")
        of_rows = vector(self, "row_embedding", init, (rows, width), axes)
        of_columns = vector(self, "column_embedding", init, (columns, width), axes)
        return (of_rows[:, None] + of_columns).reshape(-1, width)
