"""A training step with text, images and sound on a mesh equals the single-device one."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from megatransformer_jax.config.audio import AudioConfig, AudioDecoderConfig, MelConfig
from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.decoders import DitConfig
from megatransformer_jax.config.image import ImageConfig, ImageDecoderConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.media_data import MediaDataConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.distributed import make_global_batch
from megatransformer_jax.training.state import init_state, state_shardings
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import AUDIO, IMAGE, Batch, DTypePolicy, MediaBatch

# Sequences have 8 + 4 + 2 = 14 places.
ROWS, LENGTH, VOCAB = 8, 8, 268
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
SEQUENCE_MESH = MeshConfig(data=2, fsdp=2, sequence=2)
OPTIMIZER = optax.sgd(1.0)

IMAGES = ImageConfig(
    enabled=True,
    height=4,
    width=4,
    channels=1,
    patch_size=2,
    prelude_layers=0,
    coda_layers=0,
    context_length=3,
    decoder=ImageDecoderConfig(
        kind="dit",
        condition_dropout_rate=0.5,
        dit=DitConfig(width=8, num_layers=1, num_heads=2, hidden_width=8),
    ),
)
SOUND = AudioConfig(
    enabled=True,
    mel=MelConfig(
        sample_rate_hz=8000, num_mels=4, fft_samples=64, window_samples=64, hop_samples=32
    ),
    max_frames=8,
    downsampling=4,
    prelude_layers=0,
    coda_layers=1,
    context_length=3,
    decoder=AudioDecoderConfig(width=8, head_width=4, dilations=(1,), condition_dropout_rate=0.2),
)


def run_config(**mesh):
    model = ModelConfig(
        vocab_size=VOCAB,
        width=16,
        max_length=16,
        prelude_layers=0,
        core_layers=1,
        coda_layers=0,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2),
        mlp=MlpConfig(hidden_width=24),
        recurrence=RecurrenceConfig(mean_steps=2, backprop_depth=1, state_init="zero"),
        image=IMAGES,
        audio=SOUND,
        loss_weighting="learned",
    )
    data = DataConfig(
        source="media",
        batch_size=ROWS,
        sequence_length=LENGTH,
        tokenizer=TokenizerConfig(kind="bytes"),
        media=MediaDataConfig(tasks=("draw=3", "caption=1", "speak=2", "transcribe=2")),
    )
    return RunConfig(model=model, data=data, mesh=MeshConfig(**mesh))


def example_batch():
    """Rows of 5 to 8 tokens with an image, a clip, both in either order, or neither."""
    rng = np.random.default_rng(0)
    rows = np.arange(ROWS)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segments = (np.arange(LENGTH) < rng.integers(5, LENGTH + 1, (ROWS, 1))).astype(np.int32)
    has_image, has_clip = rows % 2 == 0, rows % 3 == 0
    places = rng.permuted(np.tile(np.arange(1, 5), (ROWS, 1)), axis=1)
    follows = np.zeros_like(tokens)
    follows[rows, places[:, 0]] = np.where(has_image, IMAGE, 0)
    follows[rows, places[:, 1]] = np.where(has_clip, AUDIO, 0)
    lengths = np.where(has_clip, rng.integers(3, 9, ROWS), 0).astype(np.int32)
    is_frame = np.arange(8) < lengths[:, None]
    images = rng.uniform(-1, 1, (ROWS, 1, 4, 4, 1)) * has_image[:, None, None, None, None]
    media = MediaBatch(
        follows=follows,
        images=images.astype(np.float32),
        is_image=has_image[:, None],
        is_drawn=(has_image & (rows < 6))[:, None],
        mels=(rng.uniform(-1, 1, (ROWS, 1, 8, 4)) * is_frame[:, None, :, None]).astype(np.float32),
        mel_lengths=lengths[:, None],
        is_spoken=(has_clip & (rows > 0))[:, None],
        task=np.zeros(ROWS, np.int32),
    )
    mask = (segments * (follows == 0)).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape) * segments
    return Batch(tokens, np.roll(tokens, -1, 1), mask, segments, positions, media)


def noisy_state(model):
    """Nothing is zero, where gradients of what is before it would be zero too."""
    state = jax.eval_shape(lambda key: init_state(model, OPTIMIZER, key), jax.random.key(0))
    rng = np.random.default_rng(1)
    noisy = lambda leaf: np.float32(rng.normal(0, 0.3, leaf.shape))  # noqa: E731
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    return dataclasses.replace(zeros, params=jax.tree.map(noisy, state.params))


def run_once(function, *arguments):
    """Such programs are not worth the time of a thorough compilation."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
    if jax.__version_info__ < (0, 11):  # Later ones have no other way.
        options["xla_cpu_use_fusion_emitters"] = False
    return function.lower(*arguments).compile(compiler_options=options)(*arguments)


def parts_on(config, mesh_config):
    mesh = make_mesh(mesh_config, jax.devices())
    check_run_fits_mesh(config, mesh)
    sharder = Sharder(mesh)
    return build_model(config.model, DTypePolicy(), sharder, "cpu"), sharder


@pytest.fixture(scope="module")
def alone():
    config = run_config()
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    before = noisy_state(model)
    step = jax.jit(make_train_step(model, OPTIMIZER, config))
    return model, before, *run_once(step, before, example_batch())


def test_a_sharded_step_equals_the_single_device_one(alone):
    config = run_config()
    model, sharder = parts_on(config, MESH)
    _, before, wanted, wanted_metrics = alone
    shardings = state_shardings(model, OPTIMIZER, sharder)
    step = jax.jit(make_train_step(model, OPTIMIZER, config), out_shardings=(shardings, None))
    batch = make_global_batch(example_batch(), sharder)
    after, metrics = run_once(step, jax.device_put(before, shardings), batch)
    assert metrics["drawn_images"] == 3 and metrics["spoken_clips"] == 2
    for name, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(after.params),
        jax.tree.leaves(wanted.params),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5, err_msg=name)
    encoder = after.params["media"]["image_prelude"]["embedding"]["kernel"]
    assert encoder.shape == (4, 16) and encoder.addressable_shards[0].data.shape == (4, 8)


def test_the_step_moves_every_parameter(alone):
    """Else equal parameters after the step would prove nothing."""
    _, before, after, _ = alone
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), before.params, after.params)
    still = [
        jax.tree_util.keystr(path)
        for path, size in jax.tree_util.tree_leaves_with_path(moved)
        if size < 1e-6
    ]
    assert not still


def test_sequences_with_media_may_be_cut(alone):
    def outputs(model):
        def apply(params, batch):
            output = model.apply(
                {"params": params},
                batch.tokens,
                segment_ids=batch.segment_ids,
                num_steps=2,
                media=batch.media,
            )
            return output.logits, output.conditions

        return jax.jit(apply)

    model, sharder = parts_on(run_config(), SEQUENCE_MESH)
    params = alone[1].params
    shardings = state_shardings(model, OPTIMIZER, sharder).params
    batch = make_global_batch(example_batch(), sharder)
    ours = run_once(outputs(model), jax.device_put(params, shardings), batch)
    theirs = run_once(outputs(alone[0]), params, example_batch())
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_cut_sequences_are_divisible_with_their_media():
    four = MeshConfig(data=2, sequence=4)
    with pytest.raises(ConfigError, match=r"14 places .*=8, and 4 of images and 2 of sound"):
        parts_on(run_config(), four)
