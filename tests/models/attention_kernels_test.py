"""What is said about attention kernels is what the model's layers ask for when they are traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from megatransformer_jax.config.layers import AttentionConfig, PositionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.attention_kernels import (
    KernelChoice,
    describe_choices,
    kernel_choices,
    prompt_kernels,
)
from megatransformer_jax.models.megatransformer import abstract_params, build_model
from megatransformer_jax.ops import attention
from megatransformer_jax.sharding.rules import MESH_AXES, Sharder
from megatransformer_jax.types import DTypePolicy

BASE = ModelConfig(
    vocab_size=16,
    width=16,
    max_length=256,
    core_layers=1,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=8),
    recurrence=RecurrenceConfig(core_width=640, state_init="zero"),
)


def build(config=BASE, platform="tpu"):
    return build_model(config, DTypePolicy.from_precision("bfloat16", "tpu"), Sharder(), platform)


def traced(model, length, monkeypatch):
    """The kernels that layers get, each with its head width."""
    seen, choose, params = [], attention.choose_kernel, abstract_params(model)

    def watch(requested, platform, features):
        chosen = choose(requested, platform, features)
        seen.append((features.head_width, chosen))
        return chosen

    monkeypatch.setattr(attention, "choose_kernel", watch)
    whole = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def run(params, tokens):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(
            {"params": params},
            tokens,
            num_steps=1,
            positions=tokens,
            segment_ids=tokens,
            deterministic=False,
            rngs=rngs,
        )

    jax.eval_shape(run, params, whole)
    return set(seen)


@pytest.mark.parametrize(
    ("changes", "length", "kernels"),
    [
        ({}, 128, {8: "splash", 320: "xla"}),
        ({}, 100, {8: "xla", 320: "xla"}),
        ({"positions": PositionConfig(scheme="alibi")}, 128, {8: "xla", 320: "xla"}),
        (
            {"attention": AttentionConfig(num_heads=2, logit_softcap=5.0, dropout_rate=0.1)},
            128,
            {8: "xla", 320: "xla"},
        ),
    ],
)
def test_it_is_the_kernel_that_layers_get(changes, length, kernels, monkeypatch):
    model = build(dataclasses.replace(BASE, **changes))
    widths = {"prelude": 8, "core": 320, "coda": 8}
    told = {
        (widths[stack], choice.kernel)
        for choice in kernel_choices(model, [length], is_training=True)
        for stack in choice.stacks
    }
    assert told == set(kernels.items()) == traced(model, length, monkeypatch)


def test_the_words_name_stacks_lengths_and_obstacles():
    wide, short = "it needs a head width of at most 256, not 320", "it needs multiples of 128, not"
    short += " T=64, S=64"
    choices = kernel_choices(build(), [64, 128], is_training=True)
    assert choices == (
        KernelChoice(
            "xla", ("prelude", "coda"), (64,), ("it needs multiples of 128, not T=64, S=64",)
        ),
        KernelChoice("xla", ("core",), (64,), (wide, short)),
        KernelChoice("splash", ("prelude", "coda"), (128,), ()),
        KernelChoice("xla", ("core",), (128,), (wide,)),
    )
    assert describe_choices(choices[2:]) == (
        f"splash in prelude and coda; xla in core (no fused kernel: {wide})"
    )
    assert "splash in prelude and coda for rows of 128; xla" in describe_choices(choices)
    assert prompt_kernels(build()) == choices[2:]


def test_without_a_fused_kernel_or_a_wish_for_one_there_is_no_obstacle():
    assert describe_choices(kernel_choices(build(platform="cpu"), [5], is_training=True)) == (
        "xla in prelude, core and coda"
    )
    by_name = dataclasses.replace(BASE, attention=AttentionConfig(num_heads=2, kernel="xla"))
    assert describe_choices(kernel_choices(build(by_name), [128], is_training=True)) == (
        "xla in prelude, core and coda"
    )


@pytest.mark.parametrize(
    ("ways", "length", "said"),
    [
        (2, 128, "splash in prelude and coda, heads exchanged for rows over 2 devices"),
        (4, 512, "splash in prelude and coda, keys and values gathered over 4 devices"),
        (
            4,
            256,
            "xla in prelude and coda, keys and values gathered over 4 devices (no fused kernel: it "
            "needs multiples of 128 on each of 4 devices, not T=256)",
        ),
    ],
)
def test_a_mesh_that_cuts_rows_says_what_is_exchanged(ways, length, said):
    mesh = Mesh(np.array(jax.devices()[:ways]).reshape(1, 1, 1, ways), MESH_AXES)
    model = build(dataclasses.replace(BASE, core_layers=0, recurrence=RecurrenceConfig()))
    choices = kernel_choices(model, [length], is_training=True, sharder=Sharder(mesh))
    assert describe_choices(choices) == said
