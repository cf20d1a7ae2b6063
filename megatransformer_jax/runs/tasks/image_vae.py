"""Runs that train an image autoencoder."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from megatransformer_jax.config.image import ImageVaeRunConfig
from megatransformer_jax.config.run_kinds import VaeRunConfig
from megatransformer_jax.data.media.batches import image_pipeline
from megatransformer_jax.evaluation.media.table import Tile, contact_sheet
from megatransformer_jax.models.media.image_vae import (
    ImageVae,
    build_image_vae,
    init_image_vae,
    vae_loss,
)
from megatransformer_jax.nn.parameters import axes_of
from megatransformer_jax.runs.build import MemoryPlan
from megatransformer_jax.runs.tasks.medium import MediumTask
from megatransformer_jax.runs.workdir import Workdir
from megatransformer_jax.training.media_hook import MediaSamples
from megatransformer_jax.types import DTypePolicy, ImageBatch

NUM_SAMPLES = 8


@dataclasses.dataclass(frozen=True)
class ImageVaeModel:
    """A `MediumModel`."""

    config: ImageVaeRunConfig
    policy: DTypePolicy

    @property
    def network(self) -> ImageVae:
        """The autoencoder."""
        return build_image_vae(self.config.model, self.config.channels, self.policy)

    def init(self, key: jax.Array) -> Any:
        """See `MediumModel`."""
        return nn.meta.unbox(init_image_vae(self.network, key))

    def axes(self) -> Any:
        """See `MediumModel`."""
        return axes_of(
            jax.eval_shape(lambda key: init_image_vae(self.network, key), jax.random.key(0))
        )

    def loss(
        self, params: Any, batch: ImageBatch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `MediumModel`."""
        weight = self.config.loss.kl_weight
        return vae_loss(self.network, params, batch.images, key, weight)

    def judge(self, params: Any, batch: ImageBatch) -> dict[str, jax.Array]:
        """The loss and its parts, the noise on latents being the same at every call."""
        loss, terms = self.loss(params, batch, jax.random.key(0))
        return {"loss": loss, **terms}


def make_image_vae(config: VaeRunConfig) -> ImageVaeModel:
    """The model of a run, with the types of this machine's kind of device."""
    policy = DTypePolicy.from_precision(config.train.precision, jax.default_backend())
    return ImageVaeModel(config.image_vae, policy)


class ImageVaeTask(MediumTask):
    """A `Task`: to encode images, and to decode them again."""

    def __init__(
        self,
        config: VaeRunConfig,
        workdir: Workdir,
        stack: contextlib.ExitStack,
        plan: MemoryPlan | None = None,
    ):
        model = make_image_vae(config)
        super().__init__(
            config,
            workdir,
            stack,
            model,
            functools.partial(image_pipeline, config.data, config.image_vae.format),
            lambda batch: len(batch.images),
            plan,
        )
        self._restore = jax.jit(
            lambda params, images: model.network.apply({"params": params}, images)
        )

    def samples(self, params: Any) -> MediaSamples:
        """Held-out images, and below them what is left after encoding and decoding."""
        images = self.validation.batches[0].images
        rows = [
            np.asarray(array.addressable_data(0))[:NUM_SAMPLES]
            for array in (images, self._restore(params, images))
        ]
        names = ("recorded", "restored")
        tiles = [Tile(image, name) for name, row in zip(names, rows, strict=True) for image in row]
        return MediaSamples(images={"restored": contact_sheet(tiles, columns=len(rows[0]))})
