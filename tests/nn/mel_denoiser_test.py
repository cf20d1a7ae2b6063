"""The mel network uses the time, knows how far along it is, and sees every frame of a clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.audio import AudioDecoderConfig
from megatransformer_jax.nn.mel_denoiser import NUM_WAVES, MelDenoiser, progress_waves
from megatransformer_jax.types import DTypePolicy

FRAMES, BINS = 9, 4
LENGTHS = jnp.asarray([FRAMES, 5])
CONTEXT = jax.random.normal(jax.random.key(1), (2, 3, 6))
IS_CONTEXT = jnp.asarray([[True, True, True], [False, True, True]])


@pytest.fixture(scope="module")
def predict():
    config = AudioDecoderConfig(width=8, head_width=4, dilations=(2,))
    module = MelDenoiser(config, DTypePolicy())
    mels = jnp.zeros((2, FRAMES, BINS))
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), mels, LENGTHS, jnp.ones(2), CONTEXT, IS_CONTEXT)
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3), shapes)
    return jax.jit(
        lambda mels, time, context: module.apply(
            jax.tree.map(lambda x: x.astype(jnp.float32), variables),
            mels,
            LENGTHS,
            time,
            context,
            IS_CONTEXT,
        )
    )


def test_the_prediction_changes_with_time_condition_and_every_frame(predict):
    mels = jax.random.normal(jax.random.key(2), (2, FRAMES, BINS))
    time = jnp.asarray([0.3, 0.6])
    plain = predict(mels, time, CONTEXT)
    assert plain.dtype == jnp.float32
    np.testing.assert_array_equal(plain[1, 5:], 0)
    later = predict(mels, time.at[0].set(0.35), CONTEXT)
    assert np.abs(later[0] - plain[0]).min() > 0
    np.testing.assert_allclose(later[1], plain[1], rtol=1e-5, atol=1e-6)
    # The order of what is to be said matters.
    turned = predict(mels, time, CONTEXT[:, ::-1])
    assert np.abs(turned[0] - plain[0]).max() > 1e-3
    # Attention reaches from the last frame to the first, and padding reaches nothing.
    changed = predict(mels.at[1, 4].add(1.0).at[1, 5:].add(9.0), time, CONTEXT)
    assert np.abs(changed[1, 0] - plain[1, 0]).max() > 1e-5
    padded = predict(mels.at[1, 5:].add(9.0), time, CONTEXT)
    np.testing.assert_allclose(padded, plain, rtol=1e-5, atol=1e-6)


def test_waves_run_from_the_first_to_the_last_place():
    waves = progress_waves(jnp.asarray([[False, True, True, True, False], [False] * 5]))
    assert waves.shape == (2, 5, 2 * NUM_WAVES)
    k = np.arange(1, NUM_WAVES + 1)
    for place, progress in ((1, 0.0), (2, 0.5), (3, 1.0)):
        angle = np.pi * progress * k
        expected = np.concatenate([np.cos(angle), np.sin(angle)])
        np.testing.assert_allclose(waves[0, place], expected, atol=1e-5)
    assert np.isfinite(waves).all()
