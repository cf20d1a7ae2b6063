"""A run that draws latents starts with the trained autoencoder, and nothing else of its own."""

import jax
import numpy as np
import pytest

from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.decoders import FlowSamplerConfig
from megatransformer_jax.config.image import (
    ImageConfig,
    ImageDecoderConfig,
    ImageVaeConfig,
    ImageVaeRunConfig,
)
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.runs.tasks import start as image_vae_start
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import init_state
from megatransformer_jax.types import DTypePolicy

VAE = ImageVaeConfig(base_width=8)
CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=272,
        width=8,
        prelude_layers=0,
        core_layers=1,
        coda_layers=0,
        attention=AttentionConfig(num_heads=1),
        mlp=MlpConfig(hidden_width=8),
        image=ImageConfig(
            enabled=True,
            height=8,
            width=8,
            channels=1,
            prelude_layers=0,
            coda_layers=0,
            decoder=ImageDecoderConfig(
                kind="dit", vae="runs/vae", vae_model=VAE, flow_sampler=FlowSamplerConfig()
            ),
        ),
    ),
    data=DataConfig(source="media", tokenizer=TokenizerConfig(kind="bytes")),
)


@pytest.fixture
def parts():
    model = build_model(CONFIG.model, DTypePolicy(), Sharder(), "cpu")
    optimizer = build_optimizer(CONFIG.optimizer, CONFIG.train.steps, None)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = jax.eval_shape(lambda key: init_state(model, optimizer, key), jax.random.key(0))
    return model, optimizer, abstract, jax.tree.map(lambda _: everywhere, abstract)


def test_the_autoencoder_is_that_of_the_run(parts, monkeypatch):
    model, optimizer, abstract, shardings = parts
    shapes = abstract.params["media"]["image_decoder"]["image_vae"]
    trained = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.25, np.float32), shapes)
    trained = jax.device_put(trained, jax.devices()[0])
    run = ImageVaeRunConfig(height=8, width=8, channels=1, model=VAE)
    monkeypatch.setattr(image_vae_start, "load_image_vae", lambda path: (run, trained))
    state = image_vae_start.latent_state(CONFIG, model, optimizer, shardings)
    decoder = state.params["media"]["image_decoder"]
    assert all(np.all(leaf == 0.25) for leaf in jax.tree.leaves(decoder["image_vae"]))
    # The optimiser has no moments for it.
    shapes_of = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    assert len(shapes_of) < 2 * len(jax.tree.leaves(state.params))


def test_another_architecture_is_refused(parts, monkeypatch):
    model, optimizer, _, shardings = parts
    monkeypatch.setattr(
        image_vae_start, "load_image_vae", lambda path: (ImageVaeRunConfig(channels=3), {})
    )
    with pytest.raises(ConfigError, match=r"model.image.channels: 1, but the autoencoder"):
        image_vae_start.latent_state(CONFIG, model, optimizer, shardings)
