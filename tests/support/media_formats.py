"""Formats of small images and clips, for tests of rows."""

from megatransformer_jax.config.audio import AudioConfig, MelConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.data.media.records import MediaFormats

FORMATS = MediaFormats(
    ImageConfig(enabled=True, height=8, width=8, channels=1, patch_size=2),
    AudioConfig(
        enabled=True,
        max_frames=64,
        mel=MelConfig(
            sample_rate_hz=4000, num_mels=8, fft_samples=128, window_samples=128, hop_samples=64
        ),
    ),
)
