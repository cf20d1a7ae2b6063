"""Counts agree with the arrays that are made, and with what papers publish."""

from typing import Any

import jax
import pytest

from megatransformer_jax.config.build import build, load_preset, preset_names
from megatransformer_jax.config.layers import AttentionConfig, PositionConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.cost.parameter_counts import (
    ParameterCounts,
    count_parameters,
    effective_parameters,
    total_parameters,
)
from megatransformer_jax.models.megatransformer import abstract_params, build_model, init_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


def count(config: ModelConfig) -> ParameterCounts:
    return count_parameters(abstract_params(build_model(config, DTypePolicy(), Sharder(), "cpu")))


def preset(name: str) -> ModelConfig:
    data: dict[str, Any] = {"sequence_length": 16}
    if name.startswith("multimodal"):
        media = {"tasks": ("draw=1", "speak=1")}
        data |= {"source": "media", "tokenizer": {"kind": "bytes"}, "media": media}
    return build({"preset": name, **load_preset(name), "data": data}).model


def test_counts_are_the_sizes_of_the_arrays() -> None:
    config = preset("tiny")
    params = init_params(build_model(config, DTypePolicy(), Sharder(), "cpu"), jax.random.key(0))
    sizes = {part: sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in params}
    counts = {part: sum(kinds.values()) for part, kinds in count(config).items()}
    counts["core"] += counts.pop("adapter")
    assert counts == sizes


# As docs/cost.md has them; the other presets' sizes are in tests/config/build_presets_test.py.
MULTIMODAL_SIZES = {
    "multimodal_tiny": 1.94e6,
    "multimodal_small": 24.8e6,
    "multimodal_medium": 338e6,
    "multimodal_large": 2.73e9,
}


@pytest.mark.parametrize("name", preset_names())
def test_every_parameter_of_every_preset_is_counted_once(name: str) -> None:
    config = preset(name)
    shapes = abstract_params(build_model(config, DTypePolicy(), Sharder(), "cpu"))
    counts = count_parameters(shapes)
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert total_parameters(counts) == total
    if name in MULTIMODAL_SIZES:
        assert total == pytest.approx(MULTIMODAL_SIZES[name], rel=0.01)
        media = [part for part in counts if part.startswith(("image_", "audio_"))]
        sizes = {
            part: sum(leaf.size for leaf in jax.tree.leaves(shapes["media"][part]))
            for part in media
        }
        assert {part: sum(counts[part].values()) for part in media} == sizes
        assert len(media) == 6


def test_huginn_has_the_published_size() -> None:
    # Section 4.2 of arXiv 2502.05171: 1.5B in prelude and coda, 1.5B in the core, 0.5B in the tied
    # embedding, 3.5B in all, and about 50B materialised at depth 32.
    counts = count(preset("huginn_3_5b"))
    outer = sum((counts["prelude"] | counts["coda"]).values()) * 2
    core = sum(counts["core"].values()) + sum(counts["adapter"].values())
    assert 1.5e9 < outer < 1.65e9
    assert 1.5e9 < core < 1.7e9
    assert 3.5e9 < total_parameters(counts) < 3.9e9
    assert 50e9 < effective_parameters(counts, 32) < 55e9


def test_gpt2_small_has_the_published_size() -> None:
    assert total_parameters(count(preset("gpt2_small"))) == 124_439_808


def test_parts_and_kinds() -> None:
    config = ModelConfig(
        vocab_size=10,
        width=8,
        max_length=6,
        tie_embeddings=False,
        head_bias=True,
        positions=PositionConfig(scheme="learned"),
        attention=AttentionConfig(num_heads=2, qk_norm=True),
        recurrence=RecurrenceConfig(
            core_width=4, injection_norm=True, iteration_norm=True, readout_matrix=True
        ),
    )
    counts = count(config)
    assert list(counts) == [
        "embedding",
        "prelude",
        "injection_norm",
        "core_in",
        "adapter",
        "core",
        "core_out",
        "c_matrix",
        "coda",
        "final_norm",
        "head",
    ]
    assert counts["embedding"] == {"other": 10 * 8 + 6 * 8}
    assert counts["head"] == {"other": 10 * 8 + 10}
    assert counts["core_in"] == counts["core_out"] == {"other": 32}
    assert counts["adapter"] == {"other": 2 * 4 * 4}
    assert counts["prelude"] == {
        "attention": 4 * 8 * 8 + 2 * 4,
        "feed_forward": 3 * 8 * 704,
        "norms": 2 * 8,
    }
    # Two layers of two norms each, and the norm at the end of an iteration.
    assert counts["core"]["norms"] == 5 * 4


def test_effective_parameters_repeat_the_core_only() -> None:
    counts = {"embedding": {"other": 100}, "adapter": {"other": 5}, "core": {"norms": 7}}
    assert effective_parameters(counts, 1) == 112
    assert effective_parameters(counts, 4) == 112 + 3 * 12
    assert effective_parameters({"prelude": {"norms": 3}}, 9) == 3
