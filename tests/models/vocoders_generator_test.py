"""What every vocoder promises, and both of them together with their discriminators."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.vocoder import (
    DiscriminatorConfig,
    HifiganConfig,
    IstftConfig,
    VocoderConfig,
    VocoderLossConfig,
)
from megatransformer_jax.losses.sound import vocoder_loss
from megatransformer_jax.models.vocoders import (
    DISCRIMINATOR,
    GENERATOR,
    build_generator,
    init_vocoder,
    vocoder_axes,
)
from megatransformer_jax.types import DTypePolicy, WaveformBatch

MEL = MelConfig(sample_rate_hz=1000, num_mels=4, fft_samples=32, window_samples=32, hop_samples=8)
POLICY = DTypePolicy()
SNAKE = HifiganConfig((4, 2), (3,), (3,), activation="snake")
LOSS = VocoderLossConfig(fft_samples=(16,))
SMALL: dict[str, Any] = {"mel": MEL, "width": 8, "segment_frames": 6, "loss": LOSS}
CONFIGS = {
    "istft": VocoderConfig(istft=IstftConfig(1, 3, 2, griffin_lim_steps=2), **SMALL),
    "learned_phase": VocoderConfig(istft=IstftConfig(1, 3, 2, griffin_lim_steps=0), **SMALL),
    "hifigan": VocoderConfig(kind="hifigan", hifigan=SNAKE, **SMALL),
}


@pytest.fixture(scope="module", params=CONFIGS)
def vocoder(request):
    """The config, its parameters, and the compiled generator."""
    config = CONFIGS[request.param]
    params = jax.jit(lambda key: init_vocoder(config, POLICY, key))(jax.random.key(1))
    generator = build_generator(config, POLICY)
    return config, params, jax.jit(lambda *x: generator.apply({"params": x[0]}, *x[1:]))


def test_a_waveform_has_frames_times_hop_samples_and_padding_never_matters(vocoder) -> None:
    _, params, run = vocoder
    rng = np.random.default_rng(0)
    mels = rng.uniform(-1, 0.5, (2, 7, 4)).astype(np.float32)
    together = run(params[GENERATOR], mels, jnp.array([5, 7]))
    assert together.shape == (2, 56) and together.dtype == jnp.float32
    changed = mels.copy()
    changed[0, 5:] = 9.0
    np.testing.assert_array_equal(run(params[GENERATOR], changed, jnp.array([5, 7])), together)
    np.testing.assert_array_equal(together[0, 40:], 0.0)
    alone = run(params[GENERATOR], mels[:1, :5], jnp.array([5]))
    np.testing.assert_allclose(together[0, :40], alone[0], atol=1e-5)
    assert np.abs(together).max() > 0
    mels[1, 0] += 0.5
    assert np.abs(run(params[GENERATOR], mels, jnp.array([5, 7]))[1] - together[1]).max() > 1e-4


def test_axes_belong_to_all_parameters_and_gradients_reach_them(vocoder) -> None:
    config, params, _ = vocoder
    axes = vocoder_axes(config, POLICY)
    jax.tree.map(lambda leaf, names: len(names) == leaf.ndim or 1 / 0, params, axes)
    batch = waveform_batch()
    loss, gradients = jax.jit(
        jax.value_and_grad(lambda p: vocoder_loss(config, POLICY, p, batch)[0])
    )(params)
    assert np.isfinite(loss)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def waveform_batch() -> WaveformBatch:
    waveforms = np.random.default_rng(2).uniform(-0.5, 0.5, (2, 48)).astype(np.float32)
    waveforms[1, 32:] = 0
    return WaveformBatch(jnp.array(waveforms), jnp.array([6, 4]))


def test_generator_and_discriminators_are_each_moved_by_their_own_loss() -> None:
    adversary = DiscriminatorConfig(enabled=True, periods=(3,), num_scales=1, width=4)
    leaky = HifiganConfig((8,), (3,), (1,))
    config = VocoderConfig(kind="hifigan", hifigan=leaky, discriminator=adversary, **SMALL)
    params = jax.jit(lambda key: init_vocoder(config, POLICY, key))(jax.random.key(0))
    batch = waveform_batch()
    names = ("stft_loss", "mel_loss", "adversarial_loss", "feature_loss", "discriminator_loss")

    @jax.jit
    def each(params):
        def values(params):
            """The total first, then its terms."""
            total, terms = vocoder_loss(config, POLICY, params, batch)
            return jnp.stack([total, *map(terms.get, names)]), (total, terms)

        jacobian, (total, terms) = jax.jacrev(values, has_aux=True)(params)
        return (total, terms), jacobian

    (total, terms), jacobian = each(params)
    weights = {"stft_loss": 1, "mel_loss": 1, "adversarial_loss": 1, "feature_loss": 2}
    weights["discriminator_loss"] = 1
    assert set(terms) == set(weights)
    assert total == pytest.approx(sum(w * float(terms[n]) for n, w in weights.items()), rel=1e-5)

    def moves(part: str) -> np.ndarray:
        leaves = jax.tree.leaves(jacobian[part])
        return np.max([np.abs(leaf).reshape(len(leaf), -1).max(axis=1) for leaf in leaves], axis=0)

    assert (moves(GENERATOR)[1:5] > 0).all() and moves(GENERATOR)[5] == 0
    assert (moves(DISCRIMINATOR)[1:5] == 0).all() and moves(DISCRIMINATOR)[5] > 0
    for leaf in jax.tree.leaves(jacobian[DISCRIMINATOR]):
        # Rounding goes with the largest entry of a leaf.
        atol = 1e-6 * np.abs(leaf[5]).max()
        np.testing.assert_allclose(leaf[0], leaf[5], rtol=1e-5, atol=atol)
