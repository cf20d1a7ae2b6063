"""The encoders of a config."""

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.preludes.audio import AudioPrelude
from megatransformer_jax.models.preludes.image import ImagePrelude
from megatransformer_jax.models.preludes.prelude import Prelude
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


def build_image_prelude(
    config: ModelConfig, policy: DTypePolicy, sharder: Sharder, platform: str
) -> Prelude:
    """The encoder of `config.image`. `platform` as in `build_model`."""
    return ImagePrelude(config, policy, sharder, platform)


def build_audio_prelude(
    config: ModelConfig, policy: DTypePolicy, sharder: Sharder, platform: str
) -> Prelude:
    """The encoder of `config.audio`. `platform` as in `build_model`."""
    return AudioPrelude(config, policy, sharder, platform)
