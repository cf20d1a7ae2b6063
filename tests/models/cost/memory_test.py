"""Memory estimates against real arrays; `tests/runs/cost_memory_test.py` has the compiler's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from smallest_media_model import make_model

from megatransformer_jax.config.decoders import DitConfig
from megatransformer_jax.config.image import ImageConfig, ImageDecoderConfig
from megatransformer_jax.config.layers import AttentionConfig, PeerConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.cost.memory import (
    activation_memory,
    cache_bytes_per_token,
    tree_bytes,
)
from megatransformer_jax.models.megatransformer import MegaTransformer, build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy, MediaBatch

ROWS, LENGTH = 4, 64
SMALL = ModelConfig(
    vocab_size=2048,
    width=64,
    core_layers=1,
    coda_layers=0,
    attention=AttentionConfig(num_heads=4),
    mlp=MlpConfig(hidden_width=176),
    recurrence=RecurrenceConfig(backprop_depth=3),
)
VARIANTS = {
    "no_remat": SMALL,
    "full_remat": dataclasses.replace(SMALL, remat="full"),
    "dots_remat": dataclasses.replace(SMALL, remat="dots"),
    "no_core": dataclasses.replace(SMALL, core_layers=0, recurrence=RecurrenceConfig()),
}


def build(config: ModelConfig, policy: DTypePolicy | None = None) -> MegaTransformer:
    return build_model(config, policy or DTypePolicy(), Sharder(), "cpu")


def test_remat_keeps_less() -> None:
    full, dots = (
        activation_memory(build(VARIANTS[name]), ROWS, LENGTH)
        for name in ("full_remat", "dots_remat")
    )
    # Of a rematerialised iteration only the state that it starts from, and its number, are kept.
    assert full.per_iteration == pytest.approx(ROWS * LENGTH * SMALL.width * 4, rel=0.01)
    # The products with weights come on top: adapter, qkv, output, up (gate and up), down.
    products = (1 + 3 + 1 + 1) * SMALL.width + 2 * SMALL.mlp.hidden_width
    extra = dots.per_iteration - full.per_iteration
    assert extra == pytest.approx(ROWS * LENGTH * products * 4, rel=0.2)
    # All of one iteration is there while its gradients are computed.
    plain = activation_memory(build(VARIANTS["no_remat"]), ROWS, LENGTH)
    assert full.one_iteration == dots.one_iteration == plain.per_iteration


def test_cache_has_a_slot_per_layer_and_iteration() -> None:
    config = dataclasses.replace(
        SMALL, prelude_layers=1, core_layers=2, coda_layers=3, attention=AttentionConfig(4, 2)
    )
    slot = 2 * 2 * 16  # Key and value, two KV heads, head width 16.
    for depth, slots in ((0, 4), (1, 6), (8, 20)):
        assert cache_bytes_per_token(config, depth, jnp.dtype("float32")) == slots * slot * 4
        assert cache_bytes_per_token(config, depth, jnp.dtype("bfloat16")) == slots * slot * 2
        on_tpu = cache_bytes_per_token(config, depth, jnp.dtype("bfloat16"), "tpu")
        assert on_tpu == slots * 2 * 128 * 2  # Key and value fill 128 lanes of a TPU together.


def test_cache_follows_the_width_of_the_core() -> None:
    recurrence = RecurrenceConfig(core_width=32)
    narrow = dataclasses.replace(SMALL, core_layers=1, recurrence=recurrence)
    wide = dataclasses.replace(narrow, recurrence=RecurrenceConfig())
    per_iteration = [
        cache_bytes_per_token(config, 5, jnp.dtype("float32"))
        - cache_bytes_per_token(config, 4, jnp.dtype("float32"))
        for config in (narrow, wide)
    ]
    assert per_iteration == [2 * 32 * 4, 2 * 64 * 4]


def test_tree_bytes_counts_shards() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    tree = {"cut": jnp.zeros((8, 6), jnp.float32), "whole": jnp.zeros(5, jnp.bfloat16)}
    shardings = {
        "cut": NamedSharding(mesh, PartitionSpec("a", "b")),
        "whole": NamedSharding(mesh, PartitionSpec()),
    }
    assert tree_bytes(tree) == tree_bytes(jax.eval_shape(lambda: tree)) == 8 * 6 * 4 + 5 * 2
    assert tree_bytes(jax.device_put(tree, shardings)) == 8 * 6 * 4 // 4 + 5 * 2


def test_peers_tables_are_parameters_and_not_kept_for_the_backward_pass() -> None:
    def kept(num_experts: int) -> int:
        mlp = MlpConfig(kind="peer", peer=PeerConfig(num_experts=num_experts, key_dim=8))
        return activation_memory(build(dataclasses.replace(SMALL, mlp=mlp)), 1, 32).total(3)

    one_table = 256**2 * SMALL.width * 4
    assert kept(256**2) - kept(32**2) < one_table / 10


def test_each_slot_keeps_its_encoder_coda_and_decoder() -> None:
    width, places = 16, 4
    dit = DitConfig(width=8, num_layers=1, num_heads=2, hidden_width=8)
    image = ImageConfig(
        enabled=True,
        height=4,
        width=4,
        channels=1,
        patch_size=2,
        prelude_layers=0,
        coda_layers=0,
        context_length=4,
        decoder=ImageDecoderConfig(kind="dit", dit=dit),
    )
    config = dataclasses.replace(
        VARIANTS["no_core"], width=width, prelude_layers=1, image=image, max_length=64
    )
    model = build(config)

    def kept(slots: int, learned: int) -> int:
        shape = lambda dtype, *extents: jax.ShapeDtypeStruct((ROWS, *extents), dtype)  # noqa: E731
        media = MediaBatch(
            follows=shape(jnp.int32, 8),
            images=shape(jnp.float32, slots, 4, 4, 1),
            is_image=shape(jnp.bool_, slots),
            is_drawn=shape(jnp.bool_, slots),
        )
        return activation_memory(model, ROWS, 8, media, (ROWS * learned, 0)).once

    one, two, read_only = kept(1, 1), kept(2, 2), kept(2, 1)
    # Per place of a slot a layer keeps its hidden units; per patch the decoder keeps as many.
    assert read_only - one > ROWS * places * 2 * config.mlp.hidden_width * 4
    assert two - read_only > ROWS * places * 8 * 8 * 4


def test_a_model_that_makes_no_images_keeps_nothing_of_its_decoder() -> None:
    """As of `which_digit`, whose images are all read."""
    model = make_model()[0]
    shape = lambda dtype, *extents: jax.ShapeDtypeStruct((ROWS, *extents), dtype)  # noqa: E731
    media = MediaBatch(
        follows=shape(jnp.int32, 8),
        images=shape(jnp.float32, 1, 8, 8, 1),
        is_image=shape(jnp.bool_, 1),
        is_drawn=shape(jnp.bool_, 1),
        mels=shape(jnp.float32, 1, 8, 8),
        mel_lengths=shape(jnp.int32, 1),
        is_spoken=shape(jnp.bool_, 1),
    )
    reads, draws, speaks = (
        activation_memory(model, ROWS, 8, media, learned).total(1)
        for learned in ((0, 0), (ROWS, 0), (0, ROWS))
    )
    assert reads < min(draws, speaks)
