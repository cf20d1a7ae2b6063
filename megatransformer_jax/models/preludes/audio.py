"""The encoder of sound: convolutions over mel frames, then layers."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.codas.coda import side_context
from megatransformer_jax.models.preludes.media_embedding import MediaEmbedding
from megatransformer_jax.models.preludes.media_stack import media_stack
from megatransformer_jax.models.preludes.prelude import Encoded
from megatransformer_jax.nn.conv import ConvDownsampling, frame_mask
from megatransformer_jax.nn.parameters import vector, weight_init
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


class AudioPrelude(nn.Module):
    """Strided convolutions, linear, plus a learned vector per position, then layers that are not
    causal. A clip of l frames takes ceil(l / downsampling) places. See `Prelude`."""

    config: ModelConfig
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    @nn.compact
    def __call__(
        self,
        media: Float[Array, "N F M"],
        lengths: Int[Array, "N"] | None,
        deterministic: bool,
    ) -> Encoded:
        """Encodes clips; see `Prelude`. F is at most `max_frames`."""
        audio = self.config.audio
        if lengths is None:
            raise ValueError("lengths are None, but clips need them; pass the frames of each.")
        if media.shape[-1] != audio.mel.num_mels or media.shape[1] > audio.max_frames:
            raise ValueError(
                f"spectrograms have {media.shape[1]} frames of {media.shape[-1]} bins, but "
                f"model.audio allows {audio.max_frames} frames (max_frames) and has "
                f"{audio.mel.num_mels} bins (mel.num_mels); change either."
            )
        width = self.config.width
        num_halvings = audio.downsampling.bit_length() - 1
        downsample = ConvDownsampling(width, num_halvings, self.policy, name="downsampling")
        frames, lengths = downsample(media, lengths)
        is_place = frame_mask(lengths, frames.shape[1])
        init = weight_init(self.config, width).embedding
        shape, axes = (audio.num_tokens, width), (None, "embed")
        positions = vector(self, "position_embedding", init, shape, axes)[: frames.shape[1]]
        embed = MediaEmbedding(self.config, self.policy, name="embedding")
        x = embed(frames, positions, deterministic)
        layers = media_stack(
            self.config, audio.prelude_layers, self.policy, self.sharder, self.platform
        )
        x = layers(x, side_context(self.config, is_place, deterministic))
        return Encoded(jnp.where(is_place[..., None], x, 0), is_place)
