"""Floating-point operations of images and sound, per medium, from the config alone."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from megatransformer_jax.models.cost.parameter_counts import abstract_params
from megatransformer_jax.models.cost.traced_flops import product_flops
from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.models.megatransformer import MegaTransformer


@dataclasses.dataclass(frozen=True)
class MediumFlops:
    """FLOPs of one image, or of one clip of the most frames, in forward passes.

    Attributes:
      places: positions of the sequence that it takes.
      prelude: its encoder.
      coda: what its decoder reads, from a full window.
      decoder: what a training step asks of its decoder: one call of the network.
      sampling: making it, all steps of the config's sampler, with guidance if it has one.
      sampling_steps: how many these are.
    """

    places: int
    prelude: float
    coda: float
    decoder: float
    sampling: float
    sampling_steps: int

    @property
    def forward(self) -> float:
        """Encoder, coda and decoder once each, as for a medium that is learned to be made."""
        return self.prelude + self.coda + self.decoder


def media_flops(model: MegaTransformer) -> dict[str, MediumFlops]:
    """'image' and 'audio', as far as the model has them, counted by tracing their parts.

    Args:
      model: off any mesh; a kernel of attention that cannot be counted does not matter, as these
        parts take none.
    """
    config, params = model.config, abstract_params(model)
    found = {}
    if config.image.enabled:
        image = jax.ShapeDtypeStruct((1, *config.image.shape), jnp.float32)
        found["image"] = _count(model, params, "image", (image,))
    if config.audio.enabled:
        shape = (1, config.audio.max_frames, config.audio.mel.num_mels)
        clip = jax.ShapeDtypeStruct(shape, jnp.float32)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        found["audio"] = _count(model, params, "audio", (clip, lengths))
    return found


def _count(
    model: MegaTransformer, params: Any, kind: str, media: tuple[jax.ShapeDtypeStruct, ...]
) -> MediumFlops:
    config: Any = getattr(model.config, kind)
    window = (1, config.context_length)
    latents = jax.ShapeDtypeStruct((*window, model.config.width), model.policy.compute)
    exists = jax.ShapeDtypeStruct(window, jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0))
    sampler = config.decoder.settings if kind == "image" else config.decoder.sampler

    def apply(method: Any, *arguments: Any) -> float:
        def call(params: Any, *arguments: Any) -> Any:
            return model.apply({"params": params}, *arguments, method=method)

        return product_flops(call, params, *arguments)

    def encode(model: MegaTransformer, media: jax.Array, lengths: jax.Array | None = None) -> Any:
        prelude = getattr(model.media, f"{kind}_prelude")
        return prelude(media, lengths, True).embeddings

    def conclude(model: MegaTransformer, latents: jax.Array, exists: jax.Array) -> Condition:
        return cast(Condition, getattr(model.media, f"{kind}_coda")(latents, exists, True))

    # Conditions are put together inside, from arrays: here there are only shapes.
    def learn(model: MegaTransformer, media: Any, context: Any, exists: Any, key: Any) -> Any:
        learn_one: Any = model.image_loss if kind == "image" else model.audio_loss
        return learn_one(*media, Condition(context, exists), key)

    def make(model: MegaTransformer, context: Any, exists: Any, key: Any) -> Any:
        make_one: Any = model.sample_images if kind == "image" else model.sample_audio
        return make_one(Condition(context, exists), key)

    return MediumFlops(
        places=config.num_tokens,
        prelude=apply(encode, *media),
        coda=apply(conclude, latents, exists),
        decoder=apply(learn, media, latents, exists, key),
        sampling=apply(make, latents, exists, key),
        sampling_steps=sampler.num_steps,
    )
