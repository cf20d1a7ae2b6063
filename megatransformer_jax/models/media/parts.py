"""The parts of a model that read and make images and sound: preludes, codas and decoders."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.media.build import build_audio_decoder, build_image_decoder
from megatransformer_jax.models.media.coda import Coda, build_coda
from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.models.media.preludes import (
    Encoded,
    build_audio_prelude,
    build_image_prelude,
    encode_used,
)
from megatransformer_jax.ops.interleave import Layout, interleave_layout, window_before
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy, MediaBatch

MediaEmbeddings = tuple[jax.Array | None, jax.Array | None]


class MediaParts(nn.Module):
    """Preludes, codas and decoders of the media that the config enables.

    Slots of a batch, [B, I] of images and [B, A] of clips, are taken together as N media.
    """

    config: ModelConfig
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    def setup(self) -> None:
        """Declares what is enabled, and nothing of what is not."""
        config = self.config
        parts = (self.policy, self.sharder, self.platform)
        if config.image.enabled:
            self.image_prelude = build_image_prelude(config, *parts)
            self.image_coda = build_coda(config, config.image, *parts)
            self.image_decoder = build_image_decoder(config.image, *parts, config.remat)
        if config.audio.enabled:
            self.audio_prelude = build_audio_prelude(config, *parts)
            self.audio_coda = build_coda(config, config.audio, *parts)
            self.audio_decoder = build_audio_decoder(config.audio, self.policy, config.remat)
        if config.loss_weighting == "learned":
            # Text, images, sound: logarithms of variances (arXiv 1705.07115).
            init = nn.with_partitioning(nn.initializers.zeros, (None,))
            self.log_variances = self.param("log_variances", init, (3,), jnp.float32)

    def layout(self, media: MediaBatch, segment_ids: Int[Array, "B T"]) -> Layout:
        """Where everything goes in the sequences of a batch.

        Raises:
          ValueError: if the batch has media of a kind or a size that the model does not take.
        """
        self._check(media)
        image, audio = self.config.image, self.config.audio
        nothing = jnp.zeros((segment_ids.shape[0], 0), jnp.int32)
        image_lengths = nothing
        if image.enabled:
            image_lengths = media.is_image.astype(jnp.int32) * image.num_tokens
        audio_lengths = -(-media.mel_lengths // audio.downsampling) if audio.enabled else nothing
        return interleave_layout(
            media.follows,
            segment_ids,
            image_lengths,
            audio_lengths,
            image.num_tokens if image.enabled else 0,
            audio.num_tokens if audio.enabled else 0,
        )

    def encode(
        self, media: MediaBatch, deterministic: bool, *, fills_slots: bool = False
    ) -> MediaEmbeddings:
        """Embeddings of image slots, [B, I, P, D], and of audio slots, [B, A, Q, D].

        Those of slots that are not in use are not defined, and nothing reads them.

        Args:
          media: of the batch.
          deterministic: no dropout.
          fills_slots: says that next to all slots are in use, so that looking for others would cost
            more than it saves; all are encoded.
        """
        images = clips = None
        if self.config.image.enabled:
            images = self._encode(
                self.image_prelude, media.images, None, media.is_image, deterministic, fills_slots
            )
        if self.config.audio.enabled:
            lengths = media.mel_lengths
            clips = self._encode(
                self.audio_prelude, media.mels, lengths, lengths > 0, deterministic, fills_slots
            )
        return images, clips

    def conditions(
        self, layout: Layout, latents: Float[Array, "B S D"], deterministic: bool
    ) -> dict[str, Condition]:
        """What the codas say of every slot: 'image' of B * I and 'audio' of B * A media."""
        conditions = {}
        if self.config.image.enabled:
            conditions["image"] = self._condition(
                self.image_coda, layout, latents, "image", deterministic
            )
        if self.config.audio.enabled:
            conditions["audio"] = self._condition(
                self.audio_coda, layout, latents, "audio", deterministic
            )
        return conditions

    def image_loss(
        self, images: Float[Array, "N H W C"], condition: Condition, key: Key[Array, ""]
    ) -> dict[str, Float[Array, "N"]]:
        """The image decoder's loss terms, see `MediaDecoder.loss`."""
        return self.image_decoder.loss(images, None, condition, key)

    def audio_loss(
        self,
        mels: Float[Array, "N F M"],
        lengths: Int[Array, "N"],
        condition: Condition,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "N"]]:
        """The audio decoder's loss terms, see `MediaDecoder.loss`."""
        return self.audio_decoder.loss(mels, lengths, condition, key)

    def sample_images(
        self, condition: Condition, key: Key[Array, ""], settings: Any = None
    ) -> Float[Array, "N H W C"]:
        """Images in [-1, 1], one per condition; `settings` as `MediaDecoder.sample` takes them."""
        return self.image_decoder.sample(condition, key, None, settings)[0]

    def sample_audio(
        self,
        condition: Condition,
        key: Key[Array, ""],
        lengths: Int[Array, "N"] | None = None,
        settings: Any = None,
    ) -> tuple[Float[Array, "N F M"], Int[Array, "N"]]:
        """Normalised mel spectrograms and their frames; without `lengths` the decoder decides."""
        mels, made = self.audio_decoder.sample(condition, key, lengths, settings)
        assert made is not None  # Clips have lengths.
        return mels, made

    def declare(self) -> None:
        """Runs every part once, so that all parameters get made when the model is initialised."""
        config, key = self.config, jax.random.key(0)
        context = jnp.zeros((1, 1, config.width), self.policy.compute)
        exists = jnp.ones((1, 1), bool)
        if config.image.enabled:
            images = jnp.zeros((1, *config.image.shape), jnp.float32)
            self.image_prelude(images, None, True)
            self.image_loss(images, self.image_coda(context, exists, True), key)
        if config.audio.enabled:
            frames, lengths = config.audio.max_frames, jnp.ones((1,), jnp.int32)
            mels = jnp.zeros((1, frames, config.audio.mel.num_mels), jnp.float32)
            self.audio_prelude(mels, lengths, True)
            self.audio_loss(mels, lengths, self.audio_coda(context, exists, True), key)

    def _encode(
        self,
        prelude: Any,
        media: jax.Array,
        lengths: jax.Array | None,
        is_used: jax.Array,
        deterministic: bool,
        fills_slots: bool,
    ) -> jax.Array:
        """Embeddings [B, slots, P, D] of slots [B, slots, ...]."""
        flat = media.reshape(-1, *media.shape[2:])
        flat_lengths = None if lengths is None else lengths.reshape(-1)
        if fills_slots:
            embeddings = prelude(flat, flat_lengths, deterministic).embeddings
        else:
            module, variables = prelude.unbind()
            key = None if deterministic else self.make_rng("dropout")

            def encode(media: jax.Array, lengths: jax.Array | None, group: jax.Array) -> jax.Array:
                rngs = None if key is None else {"dropout": jax.random.fold_in(key, group)}
                encoded = module.apply(variables, media, lengths, deterministic, rngs=rngs)
                return cast(Encoded, encoded).embeddings

            embeddings = encode_used(encode, flat, flat_lengths, is_used.reshape(-1), self.sharder)
        return embeddings.reshape(*media.shape[:2], *embeddings.shape[1:])

    def _condition(
        self,
        coda: Coda,
        layout: Layout,
        latents: jax.Array,
        name: str,
        deterministic: bool,
    ) -> Condition:
        size = getattr(self.config, name).context_length
        openings = getattr(layout, f"{name}_openings")
        window, exists = window_before(layout, latents, openings, size)
        return coda(window.reshape(-1, *window.shape[2:]), exists.reshape(-1, size), deterministic)

    def _check(self, media: MediaBatch) -> None:
        """Shapes, before anything is computed with them."""
        image, audio = self.config.image, self.config.audio
        wanted = (audio.max_frames, audio.mel.num_mels)
        for name, array, is_enabled, shape in (
            ("image", media.images, image.enabled, image.shape),
            ("audio", media.mels, audio.enabled, wanted),
        ):
            if (array is not None) != is_enabled:
                raise ValueError(
                    f"model.{name}.enabled={is_enabled}, and the batch has "
                    f"{'no ' if array is None else ''}{name} slots; make the batch with the "
                    "formats of the model's config."
                )
            if is_enabled and array.shape[2:] != shape:
                raise ValueError(
                    f"the batch's {name} slots have shape {array.shape[2:]}, and the model takes "
                    f"{shape}; make the batch with the formats of the model's config."
                )


def sequence_room(config: ModelConfig, media: MediaBatch) -> int:
    """Places that the media slots of a batch add to its sequences: I * P + A * Q."""
    room = 0
    if media.images is not None:
        room += media.images.shape[1] * config.image.num_tokens
    if media.mels is not None:
        room += media.mels.shape[1] * config.audio.num_tokens
    return room
