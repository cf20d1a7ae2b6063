"""Weights and counts of what media add to the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.audio import AudioConfig, AudioDecoderConfig
from megatransformer_jax.config.image import ImageConfig, ImageDecoderConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.objective import (
    MediaCounts,
    MediaRoom,
    MediaTerm,
    count_media,
    media_term,
    weigh_losses,
)
from megatransformer_jax.types import Batch, DTypePolicy, MediaBatch, ModelOutput

CONFIG = ModelConfig(
    image=ImageConfig(enabled=True, decoder=ImageDecoderConfig(loss_weight=2.0)),
    audio=AudioConfig(enabled=True, decoder=AudioDecoderConfig(loss_weight=0.5)),
)
LEARNED = dataclasses.replace(CONFIG, loss_weighting="learned")
TERM = MediaTerm(jnp.float32(3.0), jnp.float32(5.0), {})
TEXT = jnp.float32(7.0)


def counts(images: int, clips: int) -> MediaCounts:
    return MediaCounts(*(jnp.float32(number) for number in (images, images, clips, clips)))


def test_fixed_weights_add_up():
    total, metrics = weigh_losses(CONFIG, {}, TEXT, TERM, counts(4, 4), 1.0)
    assert total == 7 + 2 * 3 + 0.5 * 5
    assert metrics == {}


def test_learned_weights_follow_the_formula_and_start_as_the_fixed_ones():
    log_variances = jnp.array([0.1, -0.4, 0.7])

    def loss(log_variances, share=1.0):
        params = {"media": {"log_variances": log_variances}}
        return weigh_losses(LEARNED, params, TEXT, TERM, counts(4, 4), share)

    total, metrics = loss(log_variances)
    losses = np.array([7, 2 * 3, 0.5 * 5])
    np.testing.assert_allclose(total, np.sum(np.exp(-log_variances) * losses + log_variances))
    np.testing.assert_allclose(metrics["loss_weight_image"], np.exp(0.4), rtol=1e-6)
    assert loss(jnp.zeros(3))[0] == weigh_losses(CONFIG, {}, TEXT, TERM, counts(4, 4), 1.0)[0]
    # The best s of each is the logarithm of its loss, at which the gradient is zero.
    gradient = jax.grad(lambda s: loss(s)[0])(jnp.log(jnp.asarray(losses, jnp.float32)))
    np.testing.assert_allclose(gradient, np.zeros(3), atol=1e-6)
    # Of two micro-batches each adds half of s.
    half = loss(log_variances, share=0.5)[0]
    np.testing.assert_allclose(total - half, 0.5 * np.sum(log_variances), rtol=1e-5)


def test_a_kind_that_a_batch_lacks_leaves_its_weight_alone():
    def loss(log_variances):
        params = {"media": {"log_variances": log_variances}}
        term = MediaTerm(jnp.float32(0.0), jnp.float32(5.0), {})
        return weigh_losses(LEARNED, params, TEXT, term, counts(0, 4), 1.0)[0]

    gradient = jax.grad(loss)(jnp.zeros(3))
    assert gradient[1] == 0 and gradient[0] != 0 and gradient[2] != 0


def test_only_media_to_make_are_counted_and_averaged():
    media = MediaBatch(
        jnp.zeros((2, 3), jnp.int32),
        images=jnp.broadcast_to(jnp.arange(4.0).reshape(2, 2, 1, 1, 1), (2, 2, 4, 4, 1)),
        is_image=jnp.array([[True, True], [True, False]]),
        is_drawn=jnp.array([[True, False], [True, True]]),
        mels=jnp.broadcast_to(jnp.arange(10.0, 12.0).reshape(2, 1, 1, 1), (2, 1, 8, 6)),
        mel_lengths=jnp.array([[3], [0]]),
        is_spoken=jnp.array([[True], [True]]),
    )
    found = count_media(media)
    assert found == MediaCounts(3, 2, 1, 1)

    class FakeModel(MegaTransformer):
        """The loss of a medium is its first number."""

        def apply(self, variables, media, *rest, method):
            values = jnp.ravel(media[..., 0])[:: media[0, ..., 0].size]
            return {"loss": jnp.where(values == 1, jnp.nan, values), "part": 2 * values}

    text = jnp.zeros((2, 3))
    batch = Batch(text, text, text, text, text, media)
    condition = Condition(jnp.zeros((4, 1, 1)), jnp.zeros((4, 1), bool))
    output = ModelOutput(text, text, {"image": condition, "audio": condition})
    model = FakeModel(CONFIG, DTypePolicy(), Sharder(), "cpu")
    term = media_term(model, {}, batch, output, found, MediaRoom(3, 2), jax.random.key(0))
    # Images 0 and 2 are drawn; image 1, which is not, does not even count as NaN.
    assert term.images == pytest.approx((0 + 2) / 2)
    assert term.clips == 10
    assert term.metrics == {
        "image_loss": 1,
        "image_part": 2,
        "audio_loss": 10,
        "audio_part": 20,
    }
    tight = media_term(model, {}, batch, output, found, MediaRoom(1, 1), jax.random.key(0))
    assert np.isnan(tight.images) and tight.clips == 10
