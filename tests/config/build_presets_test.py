import dataclasses
import pathlib
import subprocess
import sys

import gin
import pytest

import megatransformer_jax
from megatransformer_jax.config import build as presets
from megatransformer_jax.config.build import (
    build,
    load_preset,
    parse_preset,
    preset_folder,
    preset_names,
)
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError

NAMES = (
    "gpt2_small",
    "huginn_3_5b",
    "modern_medium",
    "modern_small",
    "multimodal_large",
    "multimodal_medium",
    "multimodal_small",
    "multimodal_tiny",
    "parcae_140m",
    "parcae_mini",
    "recurrent_medium",
    "recurrent_mini",
    "recurrent_small",
    "recurrent_small_sandwich",
    "tiny",
)


# Data that a model with images and sound can be trained on.
MEDIA_DATA = {
    "source": "media",
    "tokenizer": {"kind": "bytes"},
    "media": {"tasks": ("draw=1", "speak=1")},
}


def preset_model(name: str) -> ModelConfig:
    data = MEDIA_DATA if name.startswith("multimodal") else {}
    return build({"preset": name, "data": data}).model


def num_weights(model: ModelConfig) -> int:
    """Weights of matrices and embeddings, by hand; no biases, norms or adapters."""
    width, heads, kv_heads = model.width, model.attention.num_heads, model.attention.kv_heads
    head_dim = model.head_dim(width)
    attention = 2 * width * heads * head_dim + 2 * width * kv_heads * head_dim
    mlp = (3 if model.mlp.kind == "gated" else 2) * width * model.mlp.hidden_width
    layers = model.prelude_layers + model.core_layers + model.coda_layers
    return model.vocab_size * width + layers * (attention + mlp)


def test_the_presets_of_the_mission_are_there() -> None:
    assert preset_names() == NAMES


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 0.28),
        ("recurrent_mini", 1.065),
        ("recurrent_small", 3.7),
        ("recurrent_small_sandwich", 3.7),
        ("recurrent_medium", 82),
        ("parcae_140m", 67.6),
        ("parcae_mini", 1.049),
        ("huginn_3_5b", 3509),
        ("gpt2_small", 123.5),
        ("modern_small", 101),
        ("modern_medium", 304),
    ],
)
def test_a_preset_builds_and_has_its_size(name: str, millions: float) -> None:
    assert num_weights(preset_model(name)) / 1e6 == pytest.approx(millions, rel=0.01)


def test_huginn_is_the_published_model() -> None:
    model = preset_model("huginn_3_5b")
    assert (model.width, model.vocab_size, model.max_length) == (5280, 65536, 4096)
    assert (model.prelude_layers, model.core_layers, model.coda_layers) == (2, 4, 2)
    assert (model.attention.num_heads, model.attention.kv_heads) == (55, 55)
    assert (model.head_dim(model.width), model.mlp.hidden_width) == (96, 17920)
    assert model.attention.qk_bias and not model.attention.qkv_bias
    assert (model.positions.rotary_base, model.positions.rotary_convention) == (
        50_000.0,
        "interleaved",
    )
    assert (model.norm.placement, model.norm.kind, model.norm.eps) == ("sandwich", "rmsnorm", 1e-6)
    assert model.tie_embeddings and model.scale_embeddings
    assert (model.recurrence.mean_steps, model.recurrence.backprop_depth) == (32, 8)
    assert (model.recurrence.adapter, model.recurrence.state_init) == ("linear", "like_init")
    assert model.init.scheme == "takase"


def test_a_preset_may_bring_its_optimiser() -> None:
    optimizer = build({"preset": "parcae_140m"}).optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.warmup_steps) == ("muon", 8e-3, 0)
    assert optimizer.num_decay_steps(1000) == 500
    assert (optimizer.muon.momentum_from, optimizer.muon.momentum_warmup_steps) == (0.85, 300)
    given = build({"preset": "parcae_140m", "optimizer": {"learning_rate": 1e-3}}).optimizer
    assert given == dataclasses.replace(optimizer, learning_rate=1e-3)


def test_plain_language_models_have_no_core() -> None:
    plain = {name for name in NAMES if not preset_model(name).is_recurrent}
    assert plain == {"gpt2_small", "modern_small", "modern_medium"}


def test_gin_registry_stays_empty() -> None:
    load_preset("huginn_3_5b")
    assert gin.config_str() == ""


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"preset: 'huge' is unknown.*huginn_3_5b"):
        load_preset("huge")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (
            "# size\nModelConfig.widht = 3",
            2,
            "model.widht|widht: no such option; did you mean 'width'",
        ),
        ("\n\nModleConfig.width = 3", 3, "'ModleConfig' is not part of a model"),
        ("RunConfig.workdir = 'x'", 1, "'RunConfig' is not part of a model"),
        ("ModelConfig.width = '3'", 1, "width: '3' is of type str; allowed: int"),
        ("AttentionConfig.num_heads = 4.0", 1, "attention.num_heads: 4.0 is of type float"),
        ("ModelConfig.width = 3\nModelConfig.width = 3", 2, "bound twice"),
        ("ModelConfig.attention = 3", 1, "no such option"),
        ("SamplerConfig.num_steps = 3", 1, "'SamplerConfig' is in the model more than once"),
        ("ModelConfig.width = @other", 1, "@other is not allowed"),
        ("ModelConfig.core_layers = 1\nModelConfig.width = %size", 2, "%size is not allowed"),
        ("a/ModelConfig.width = 3", 1, "scope 'a' is not allowed"),
        ("import os", 1, "ImportStatement is not allowed"),
        ("include 'tiny.gin'", 1, "IncludeStatement is not allowed"),
        ("ModelConfig.width 3", 1, "not valid gin"),
        ("# c\nModelConfig.width = (1,", 2, "not valid gin"),
        ("ModelConfig.width = =", 1, "not valid gin"),
    ],
)
def test_a_faulty_preset_names_file_and_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        parse_preset(text, "mine.gin")
    assert str(caught.value).startswith(f"mine.gin:{line}: ")


def test_sections_are_nested_by_their_path() -> None:
    text = "ModelConfig.width = 64\nNormConfig.eps = 1e-5\nRecurrenceConfig.core_width = None"
    text += "\nMeshConfig.fsdp = 2"
    model = {"width": 64, "norm": {"eps": 1e-5}, "recurrence": {"core_width": None}}
    assert parse_preset(text, "mine.gin") == {"model": model, "mesh": {"fsdp": 2}}
    with pytest.raises(UserError, match=r"mesh\.data: no such option"):
        parse_preset("MeshConfig.data = 2", "mine.gin")


def test_presets_of_an_installed_package_are_found(
    tmp_path: pathlib.Path, repository: pathlib.Path
) -> None:
    """In a wheel the folder is inside the package, as setup.py maps it."""
    package = tmp_path / "megatransformer_jax"
    package.symlink_to(repository / "megatransformer_jax")
    installed = tmp_path / "installed" / "megatransformer_jax"
    installed.mkdir(parents=True)
    for item in (repository / "megatransformer_jax").iterdir():
        (installed / item.name).symlink_to(item)
    (installed / "gin").symlink_to(repository / "gin")
    code = "from megatransformer_jax.config.build import *; print(preset_folder(), *preset_names())"
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.split() == [str(installed / "gin"), *NAMES]


def test_setup_puts_the_presets_into_the_wheel(repository: pathlib.Path) -> None:
    setup = (repository / "setup.py").read_text()
    assert '"megatransformer_jax.gin": "gin",' in setup
    assert '"megatransformer_jax.gin": ["*.gin"],' in setup


def test_an_incomplete_installation_is_a_clear_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "megatransformer_jax"
    package.mkdir()
    monkeypatch.setattr(presets.importlib.resources, "files", lambda _: package)
    with pytest.raises(UserError, match="installation is incomplete"):
        preset_folder()
    assert megatransformer_jax.__name__  # The real package is untouched.
