"""What every encoder of media promises: shapes, types, independence, gradients, dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.config.audio import AudioConfig, MelConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.layers import AttentionConfig, PositionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.models.media.preludes import (
    Encoded,
    Prelude,
    build_audio_prelude,
    build_image_prelude,
    encode_used,
)
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

N, WIDTH, FRAMES = 3, 8, 11
CONFIG = ModelConfig(
    width=WIDTH,
    max_length=4,  # Less than a clip's places.
    attention=AttentionConfig(num_heads=2, window=2),
    mlp=MlpConfig(hidden_width=12),
    image=ImageConfig(enabled=True, height=4, width=6, channels=1, patch_size=2),
    audio=AudioConfig(
        enabled=True,
        mel=MelConfig(num_mels=5),
        max_frames=FRAMES,
        downsampling=2,
    ),
)


def build(kind, config=CONFIG, policy=None):
    builder = build_image_prelude if kind == "image" else build_audio_prelude
    return builder(config, policy or DTypePolicy(), Sharder(), "cpu")


def media_of(kind, seed=0):
    """N media and their lengths; the last clip is an unused slot."""
    shape = CONFIG.image.shape if kind == "image" else (FRAMES, 5)
    media = jax.random.normal(jax.random.key(seed), (N, *shape))
    return media, None if kind == "image" else jnp.asarray([FRAMES, 4, 0])


class Subject:
    """A prelude with parameters that are all away from their first values."""

    def __init__(self, kind):
        self.kind, self.module = kind, build(kind)
        media, lengths = media_of(kind)
        shapes = jax.eval_shape(
            lambda: nn.meta.unbox(self.module.init(jax.random.key(0), media, lengths, True))
        )["params"]
        leaves, tree = jax.tree.flatten(shapes)
        rng = np.random.default_rng(1)
        values = [jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32) for x in leaves]
        self.variables = {"params": jax.tree.unflatten(tree, values)}
        self.encode = jax.jit(lambda v, m, n: self.module.apply(v, m, n, True))


@pytest.fixture(scope="module", params=["image", "audio"])
def subject(request):
    return Subject(request.param)


def test_places_and_types(subject):
    assert isinstance(subject.module, Prelude)
    media, lengths = media_of(subject.kind)
    encoded = subject.encode(subject.variables, media, lengths)
    assert isinstance(encoded, Encoded)
    assert encoded.embeddings.dtype == jnp.float32
    assert np.isfinite(encoded.embeddings).all()
    counts = encoded.is_embedding.sum(axis=1).tolist()
    if subject.kind == "image":
        assert encoded.embeddings.shape == (N, CONFIG.image.num_tokens, WIDTH)
        assert counts == [6, 6, 6]
    else:
        assert encoded.embeddings.shape == (N, CONFIG.audio.num_tokens, WIDTH)
        assert counts == [6, 2, 0]
        assert (encoded.is_embedding[:, 0] == jnp.asarray([True, True, False])).all()
    np.testing.assert_array_equal(encoded.embeddings[~encoded.is_embedding], 0)


def test_a_medium_depends_on_itself_alone_and_on_all_of_itself(subject):
    media, lengths = media_of(subject.kind)
    first = subject.encode(subject.variables, media, lengths).embeddings
    others, _ = media_of(subject.kind, seed=5)
    mixed = others.at[1].set(media[1])
    if lengths is not None:
        # Whatever is beyond the clip.
        mixed = mixed.at[1, 4:].set(7.0)
    second = subject.encode(subject.variables, mixed, lengths).embeddings
    np.testing.assert_array_equal(second[1], first[1])
    assert not np.allclose(second[0], first[0], atol=1e-3)
    # Not causal: the first place sees the end of the medium.
    end = (-1, -1) if lengths is None else (3,)
    changed = media.at[(1, *end)].add(1.0)
    third = subject.encode(subject.variables, changed, lengths).embeddings
    assert np.abs(third[1, 0] - first[1, 0]).max() > 1e-4


def test_gradients_reach_every_parameter(subject):
    media, lengths = media_of(subject.kind)

    def loss(variables):
        return jnp.sum(jnp.sin(3 * subject.encode(variables, media, lengths).embeddings))

    gradients = jax.jit(jax.grad(loss))(subject.variables)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


def test_a_shorter_batch_gives_the_same(subject):
    if subject.kind == "image":
        return
    media, lengths = media_of("audio")
    whole = subject.encode(subject.variables, media, lengths).embeddings
    short = subject.encode(subject.variables, media[:, :4], jnp.asarray([4, 4, 0]))
    assert short.embeddings.shape == (N, 2, WIDTH)
    np.testing.assert_allclose(short.embeddings[1], whole[1, :2], atol=1e-5)


OPTIONS = [
    ("image", {"positions": PositionConfig(scheme="alibi"), "embedding_dropout_rate": 0.5}),
    (
        "audio",
        {
            "positions": PositionConfig(scheme="learned"),
            "norm": NormConfig(placement="post"),
            "residual": "admin",
            "residual_dropout_rate": 0.5,
        },
    ),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_options_of_the_model_are_the_encoders(kind, options):
    module = build(kind, dataclasses.replace(CONFIG, **options))
    media, lengths = media_of(kind)

    @jax.jit
    def encode(key):
        plain, variables = module.init_with_output(key, media, lengths, True)
        rngs = {"dropout": key}
        return plain, module.apply(nn.meta.unbox(variables), media, lengths, False, rngs=rngs)

    plain, dropped = encode(jax.random.key(0))
    assert np.isfinite(plain.embeddings).all()
    assert not np.allclose(dropped.embeddings, plain.embeddings)
    np.testing.assert_array_equal(dropped.embeddings[~dropped.is_embedding], 0)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_the_policy_decides_the_types(kind):
    module = build(kind, policy=DTypePolicy(compute=jnp.dtype(jnp.bfloat16)))
    media, lengths = media_of(kind)
    encoded, variables = jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), media, lengths, True)
    )
    assert encoded.embeddings.dtype == jnp.bfloat16
    params = variables["params"]
    boxes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, nn.Partitioned))
    # Every parameter says what its axes are, for sharding.
    assert all(isinstance(box, nn.Partitioned) for box in boxes)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_embeddings_start_as_large_as_the_texts(kind):
    own = dataclasses.replace(getattr(CONFIG, kind), prelude_layers=0)
    module = build(kind, dataclasses.replace(CONFIG, width=64, **{kind: own}))
    media, lengths = media_of(kind)
    encode = jax.jit(lambda key: module.init_with_output(key, media, lengths, True)[0])
    encoded = encode(jax.random.key(0))
    std = (2 / (5 * 64)) ** 0.5
    size = np.asarray(encoded.embeddings)[np.asarray(encoded.is_embedding)].std()
    assert 0.7 * std < size < 2 * std


SLOTS = 20
SIZES = []


@jax.jit
def encode_some(weight, media, lengths, is_used):
    """With an encoder that notes how many media it is given."""

    def loss(weight):
        def encode(media, lengths, group):
            jax.debug.callback(lambda group: SIZES.append(media.shape[0]), group)
            return (jnp.sin(weight * media) + lengths[:, None])[:, None]

        embeddings = encode_used(encode, media, lengths, is_used, Sharder())[:, 0]
        embeddings = jnp.where(is_used[:, None], embeddings, 0)
        return jnp.sum(embeddings**2), embeddings

    return jax.grad(loss, has_aux=True)(weight)


@pytest.mark.parametrize(("used", "groups"), [([], 0), ([3, 19, 0], 1), (range(1, 20, 2), 2)])
def test_encoders_run_for_slots_in_use_only(used, groups):
    is_used = np.isin(np.arange(SLOTS), list(used))
    media = np.random.default_rng(0).normal(size=(SLOTS, 2)).astype(np.float32)
    lengths = np.arange(SLOTS, dtype=np.int32)
    SIZES.clear()
    gradient, embeddings = encode_some(jnp.float32(0.7), media, lengths, is_used)
    jax.effects_barrier()
    assert [8] * groups == SIZES
    wanted = np.where(is_used[:, None], np.sin(0.7 * media) + lengths[:, None], 0)
    np.testing.assert_allclose(embeddings, wanted, atol=1e-5)
    wanted = np.sum(2 * wanted * np.cos(0.7 * media) * media)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4)
    assert encode_some._cache_size() == 1


IMAGES, CLIPS = jnp.zeros((1, 4, 6, 1)), jnp.zeros((1, FRAMES, 5))


@pytest.mark.parametrize(
    ("kind", "media", "lengths", "message"),
    [
        ("image", IMAGES[..., :3, :], None, r"images have shape \(4, 3, 1\).* \(4, 6, 1\)"),
        ("image", IMAGES, jnp.ones(1, jnp.int32), "images have none; pass None"),
        ("audio", CLIPS, None, "clips need them; pass the frames"),
        ("audio", CLIPS[..., :4], jnp.ones(1, jnp.int32), "11 frames of 4 bins"),
        ("audio", jnp.zeros((1, 12, 5)), jnp.ones(1, jnp.int32), "12 frames .*allows 11 frames"),
    ],
)
def test_wrong_input_is_an_error(kind, media, lengths, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: build(kind).init(jax.random.key(0), media, lengths, True))
