"""The autoencoder of images: shapes, its loss against NumPy, what each term reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.config.image import ImageVaeConfig
from megatransformer_jax.models.media.image_vae import build_image_vae, init_image_vae, vae_loss
from megatransformer_jax.types import DTypePolicy

CONFIG = ImageVaeConfig(
    base_width=4, width_multipliers=(1, 2), latent_channels=3, norm_groups=2, blocks_per_level=1
)
MODEL = build_image_vae(CONFIG, 1, DTypePolicy())
IMAGES = jax.random.uniform(jax.random.key(0), (5, 4, 8, 1), minval=-1)
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def params():
    made = nn.meta.unbox(jax.jit(lambda key: init_image_vae(MODEL, key))(jax.random.key(2)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape), jnp.float32),
        made,
    )


@pytest.fixture(scope="module")
def loss_and_gradients():
    return jax.jit(
        jax.value_and_grad(
            lambda params, weight: vae_loss(MODEL, params, IMAGES, KEY, weight), has_aux=True
        )
    )


def test_every_parameter_has_axes():
    boxed = jax.eval_shape(lambda key: init_image_vae(MODEL, key), jax.random.key(0))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    assert all(isinstance(leaf, nn.Partitioned) for leaf in leaves)


def test_loss_equals_numpy(params, loss_and_gradients):
    apply = jax.jit(MODEL.apply, static_argnames="method")
    variables = {"params": params}
    mean, log_variance = map(np.asarray, apply(variables, IMAGES, method="encode"))
    assert mean.shape == log_variance.shape == (5, *CONFIG.latent_shape(4, 8)) == (5, 2, 4, 3)
    std = np.exp(log_variance / 2)
    latents = mean + std * np.asarray(jax.random.normal(KEY, mean.shape))
    restored = np.asarray(apply(variables, jnp.asarray(latents), method="decode"))
    assert restored.shape == IMAGES.shape
    error = np.mean((restored - np.asarray(IMAGES)) ** 2)
    kl = np.mean(mean**2 / 2 + std**2 / 2 - 0.5 - np.log(std))
    rms = np.sqrt(np.mean(mean**2, axis=(0, 1, 2)))
    scale_error = np.mean((params["latent_scale"] * rms - 1) ** 2)
    (loss, terms), _ = loss_and_gradients(params, 0.5)
    np.testing.assert_allclose(loss, error + 0.5 * kl + scale_error, rtol=1e-4)
    np.testing.assert_allclose(terms["squared_error"], error, rtol=1e-4)
    np.testing.assert_allclose(terms["kl"], kl, rtol=1e-4)
    # Latents of images are there and back again by the same scale.
    scaled = jnp.asarray(latents * np.asarray(params["latent_scale"]))
    restored_again = apply(variables, scaled, method="from_latent")
    np.testing.assert_allclose(restored_again, np.clip(restored, -1, 1), atol=1e-5)
    np.testing.assert_allclose(
        apply(variables, IMAGES, method="to_latent"), mean * params["latent_scale"], atol=1e-5
    )


def test_the_scale_learns_alone_and_all_parts_learn(params, loss_and_gradients):
    without, with_kl = (loss_and_gradients(params, weight)[1] for weight in (0.0, 1.0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(with_kl):
        assert np.max(np.abs(leaf)) > 0, path
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), without, with_kl)
    assert not changed["latent_scale"]
    assert not any(jax.tree.leaves(changed["decoder"]))
    assert changed["encoder"]["conv_out"]["kernel"]
    # The scale's term reaches the scale alone.
    far = dict(params, latent_scale=params["latent_scale"] + 1.0)
    moved = loss_and_gradients(far, 0.0)[1]
    assert np.any(moved["latent_scale"] != without["latent_scale"])
    jax.tree.map(np.testing.assert_array_equal, moved["encoder"], without["encoder"])


@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (1, 3, 4, 1), (1, 4, 5, 1)])
def test_images_that_do_not_fit_are_an_error(params, shape):
    with pytest.raises(ValueError, match="needs 1 channels and sides that are multiples of 2"):
        MODEL.apply({"params": params}, jnp.zeros(shape))
