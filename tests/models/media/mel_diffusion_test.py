"""The decoder of sound: the contract of all decoders, and what concerns lengths and time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_contract import (
    CHECKS,
    DecoderCase,
    check_gradients_reach_all_parameters,
    check_remat_keeps_less_and_changes_nothing,
)

from megatransformer_jax.config.audio import AudioConfig, AudioDecoderConfig, MelConfig
from megatransformer_jax.config.decoders import SamplerConfig
from megatransformer_jax.models.media.build import build_audio_decoder
from megatransformer_jax.types import DTypePolicy

CONTEXT_WIDTH, FRAMES, BINS = 6, 7, 5
CONFIG = AudioConfig(
    mel=MelConfig(num_mels=BINS),
    max_frames=FRAMES,
    decoder=AudioDecoderConfig(
        width=8, head_width=4, dilations=(2,), condition_dropout_rate=0.0, duration_weight=0.3
    ),
)
SETTINGS = SamplerConfig(num_steps=2, threshold="none")
LENGTHS = jnp.asarray([FRAMES, 3, 5])


def build(config=CONFIG):
    return build_audio_decoder(config, DTypePolicy())


@pytest.fixture(scope="module")
def case():
    mels = jax.random.uniform(jax.random.key(0), (3, FRAMES, BINS), minval=-1)
    mels = jnp.where((jnp.arange(FRAMES) < LENGTHS[:, None])[..., None], mels, 0)
    return DecoderCase(build(), mels, LENGTHS, CONTEXT_WIDTH, SETTINGS)


@pytest.mark.parametrize("check", CHECKS)
def test_contract(case, check):
    check(case)


def test_gradients_reach_all_parameters(case):
    check_gradients_reach_all_parameters(case)


def test_remat_keeps_less_and_changes_nothing(case):
    rematerialized = build_audio_decoder(CONFIG, DTypePolicy(), "full")
    check_remat_keeps_less_and_changes_nothing(case, rematerialized)


def test_padding_changes_no_term_and_no_frame(case):
    key, condition = jax.random.key(1), case.condition
    terms = case.loss(case.media, LENGTHS, condition, key)
    padding = (jnp.arange(FRAMES) >= LENGTHS[:, None])[..., None]
    filled = case.loss(jnp.where(padding, 9.0, case.media), LENGTHS, condition, key)
    # A batch whose longest clip is shorter has fewer frames.
    short = case.loss(case.media[:, :5], jnp.minimum(LENGTHS, 5), condition, key)
    for name, values in terms.items():
        np.testing.assert_allclose(filled[name], values, rtol=1e-5)
        np.testing.assert_allclose(short[name][1:], values[1:], rtol=1e-4)
    # An unused slot costs nothing, and no gradient comes of it.
    unused = case.loss(case.media, LENGTHS.at[1].set(0), condition, key)
    assert all(values[1] == 0 for values in unused.values())


def test_the_loss_adds_duration_by_its_weight(case):
    key = jax.random.key(1)
    terms = case.loss(case.media, LENGTHS, case.condition, key)
    assert len(np.unique(terms["duration"].round(5))) == 3
    params = case.variables["params"]
    longer = params["duration"] | {"bias": params["duration"]["bias"] + 1.0}
    changed = {"params": params | {"duration": longer}}
    other = case.loss(case.media, LENGTHS, case.condition, key, changed)
    np.testing.assert_allclose(other["squared_error"], terms["squared_error"], rtol=1e-5)
    difference = other["duration"] - terms["duration"]
    assert np.abs(difference).min() > 0.01
    np.testing.assert_allclose(
        other["loss"] - terms["loss"], 0.3 * difference, rtol=1e-3, atol=1e-5
    )


def test_without_lengths_the_condition_tells_them(case):
    key = jax.random.key(2)
    mels, lengths = case.sample(case.condition, key)
    log_frames = jax.jit(lambda v: case.decoder.bind(v).duration(case.condition))(case.variables)
    wanted = np.clip(np.round(np.exp(log_frames)), 1, FRAMES)
    np.testing.assert_array_equal(lengths, wanted)
    assert lengths.dtype == jnp.int32
    # The same as when these lengths are asked for, and zero beyond.
    given, _ = case.sample(case.condition, key, lengths)
    np.testing.assert_allclose(mels, given, rtol=1e-4, atol=1e-4)
    beyond = np.arange(FRAMES) >= np.asarray(lengths)[:, None]
    np.testing.assert_array_equal(np.asarray(mels)[beyond], 0)


def test_guidance_and_the_configured_sampler_are_used(case):
    key, condition = jax.random.key(2), case.condition
    plain, _ = case.sample(condition, key, LENGTHS)
    # Its own settings are those of the case.
    own = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, sampler=SETTINGS))
    decoder = build(own)

    @jax.jit
    def sample(scale):
        return decoder.apply(case.variables, condition, key, LENGTHS, None, scale, method="sample")[
            0
        ]

    np.testing.assert_allclose(sample(1.0), plain, rtol=1e-3, atol=1e-3)
    assert np.abs(sample(3.0) - plain).max() > 1e-3


def test_losses_and_sounds_are_float32_in_a_narrower_compute_type(case):
    policy = DTypePolicy(compute=jnp.dtype(jnp.bfloat16))
    narrow = build_audio_decoder(CONFIG, policy)

    def run(variables):
        key, condition = jax.random.key(0), case.condition
        terms = narrow.apply(variables, case.media, LENGTHS, condition, key, method="loss")
        return terms, narrow.apply(variables, condition, key, None, SETTINGS, method="sample")[0]

    made = jax.tree.leaves(jax.eval_shape(run, case.variables))
    assert {leaf.dtype.name for leaf in made} == {"float32"}


@pytest.mark.parametrize(
    ("mels", "lengths", "message"),
    [
        ((2, FRAMES, BINS), None, "lengths are None, but clips need them"),
        ((2, FRAMES + 1, BINS), [1, 1], "8 frames of 5 bins, but the decoder makes up to 7"),
        ((2, FRAMES, BINS - 1), [1, 1], "7 frames of 4 bins"),
    ],
)
def test_wrong_media_are_an_error(case, mels, lengths, message):
    lengths = None if lengths is None else jnp.asarray(lengths)
    condition = jax.tree.map(lambda leaf: leaf[:2], case.condition)
    with pytest.raises(ValueError, match=message):
        case.decoder.bind(case.variables).loss(
            jnp.zeros(mels), lengths, condition, jax.random.key(0)
        )


def test_lengths_out_of_range_are_an_error(case):
    with pytest.raises(ValueError, match=r"lengths of \[8\] frames; each must be from 0 to 7"):
        case.decoder.bind(case.variables).sample(
            case.condition, jax.random.key(0), jnp.asarray([1, 8, 7]), SETTINGS
        )
