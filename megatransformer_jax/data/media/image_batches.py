"""Images without text, for training an autoencoder."""

import dataclasses

import numpy as np

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.data.batches import Share
from megatransformer_jax.data.media.build import build_image_source
from megatransformer_jax.data.media.medium_batches import medium_pipeline
from megatransformer_jax.data.media.records import ImageRecord
from megatransformer_jax.data.pipeline import Pipeline
from megatransformer_jax.types import ImageBatch


@dataclasses.dataclass(frozen=True)
class WholeImages:
    """Each image as it is. A batch that is not full has its first images again.

    Attributes:
      shape: height, width, channels.
    """

    shape: tuple[int, int, int]

    def row(self, record: ImageRecord, rng: np.random.Generator) -> np.ndarray:
        """The pixels; nothing is drawn."""
        del rng
        return record.pixels

    def batch(self, rows: list[np.ndarray], size: int) -> ImageBatch:
        """Arrays of `size` rows; without any image they are grey."""
        if not rows:
            return ImageBatch(np.zeros((size, *self.shape), np.float32))
        return ImageBatch(np.stack([rows[index % len(rows)] for index in range(size)]))


def image_pipeline(
    config: DataConfig,
    image: ImageConfig,
    *,
    split: str,
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """The images of `split` for one process: 'train' is endless, 'validation' one pass.

    Args:
      config: with source='media'; `data.media.images` says where images come from.
      image: the format.
      split: 'train' or 'validation'.
      process_index: which process this is, from 0.
      process_count: how many share each global batch.

    Raises:
      UserError: if the data cannot be read.
    """
    return medium_pipeline(
        build_image_source(config, image, split),
        WholeImages(image.shape),
        config,
        split=split,
        share=Share(config.batch_size, process_index, process_count),
    )
