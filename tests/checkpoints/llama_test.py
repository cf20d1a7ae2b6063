"""Llama and its relatives compute what transformers' own classes compute, and the files agree.

The models are at random weights, norms and biases included.
"""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from foreign_models import (
    NEW_TOKENS,
    SHAPE,
    TOKENS,
    our_greedy,
    random_model,
    saved_by_transformers,
    their_greedy,
    their_logits,
)
from safetensors.numpy import load_file, save_file

import megatransformer_jax as mt
from megatransformer_jax.checkpoints.folders import load_folder, open_folder
from megatransformer_jax.checkpoints.foreign import config_to
from megatransformer_jax.checkpoints.llama import Llama
from megatransformer_jax.checkpoints.llama_relatives import Qwen2
from megatransformer_jax.checkpoints.tensor_map import FormatError
from megatransformer_jax.config.build import build, merge
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.option import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip

# By format, the config class and its values. Those of GENERATING also generate.
GENERATING = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "qwen2": (
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2Config", {"pad_token_id": None}),
}  # fmt: skip
OTHERS = {
    "llama": (
        "LlamaConfig",
        {
            "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 8,
            "hidden_act": "gelu_new", "num_hidden_layers": 1,
        },
    ),
    "qwen2": ("Qwen2Config", {"rope_parameters": YARN, "hidden_size": 32, "num_hidden_layers": 2}),
    "qwen3": (
        "Qwen3Config",
        {
            "head_dim": 6, "attention_bias": True, "num_key_value_heads": 1,
            "use_sliding_window": True, "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "olmo2": (
        "Olmo2Config", {"pad_token_id": None, "attention_bias": True, "num_key_value_heads": 4}
    ),
}  # fmt: skip


def model_of(kind, values, **options):
    return random_model(getattr(transformers, kind)(**{**SHAPE, **values}), **options)


def assert_agree(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def tensors_of(folder):
    return {
        name: (tensor.dtype, tensor.shape, tensor.tobytes())
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


@pytest.mark.parametrize("name", GENERATING)
def test_logits_tokens_and_files_agree(name, tmp_path):
    model = model_of(*GENERATING[name])
    model.save_pretrained(tmp_path / "theirs")
    lm = mt.load(tmp_path / "theirs")
    assert open_folder(tmp_path / "theirs").format.name == name
    theirs = their_logits(model)
    assert_agree(lm(TOKENS).logits, theirs)
    tokens = their_greedy(model)
    assert len(tokens) == NEW_TOKENS and len(set(tokens)) > 3
    assert our_greedy(lm) == tokens
    lm.save(tmp_path / "ours", format=name)
    assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs")
    np.testing.assert_array_equal(their_logits(saved_by_transformers(tmp_path / "ours")), theirs)
    assert open_folder(tmp_path / "ours").config == lm.config


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes_and_options_agree(name, tmp_path):
    model = model_of(*OTHERS[name], seed=1)
    model.save_pretrained(tmp_path / "theirs")
    lm = mt.load(tmp_path / "theirs")
    assert_agree(lm(TOKENS).logits, their_logits(model))
    lm.save(tmp_path / "ours", format=name)
    assert tensors_of(tmp_path / "ours") == tensors_of(tmp_path / "theirs")
    again = saved_by_transformers(tmp_path / "ours")
    np.testing.assert_array_equal(their_logits(again), their_logits(model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama, in bfloat16."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    values = {"num_hidden_layers": 1, "tie_word_embeddings": True}
    model_of("LlamaConfig", values, dtype="bfloat16").save_pretrained(folder)
    return folder


def changed(folder, output, tensors=None, **values):
    """A copy with other values in config.json, and other tensors."""
    output.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, **values}))
    stored = {**load_file(folder / "model.safetensors"), **(tensors or {})}
    save_file(stored, output / "model.safetensors")
    return output


def test_bfloat16_stays_if_asked(folder, tmp_path):
    lm = mt.load(folder, param_dtype="stored")
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {np.dtype(ml_dtypes.bfloat16)}
    lm.save(tmp_path / "ours", format="llama")
    assert tensors_of(tmp_path / "ours") == tensors_of(folder)
    assert saved_by_transformers(tmp_path / "ours").dtype == saved_by_transformers(folder).dtype
    converted = mt.load(folder)
    converted.save(tmp_path / "back", format="llama", dtype="bfloat16")
    assert tensors_of(tmp_path / "back") == tensors_of(folder)


def test_configs_of_transformers_4_mean_the_same(folder):
    values = json.loads((folder / "config.json").read_text())
    new = {**values, "rope_parameters": {**LLAMA3}}
    old = {key: value for key, value in values.items() if key != "rope_parameters"}
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old |= {"rope_theta": 50_000.0, "rope_scaling": scaling}
    assert Llama().read_config(old) == Llama().read_config(new)
    assert Llama().read_config(new).positions.scaling.original_length == 32


def test_null_is_the_default_where_there_is_one():
    nulls = dict.fromkeys(("attention_bias", "num_key_value_heads", "rope_scaling", "head_dim"))
    values = {**SHAPE, "num_key_value_heads": 4}
    assert Llama().read_config({**values, **nulls}) == Llama().read_config(values)


def test_the_base_model_alone_and_its_old_tables_are_read(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    base = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    base["layers.0.self_attn.rotary_emb.inv_freq"] = 10_000.0 ** -np.arange(0, 1, 1 / 3, np.float32)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text((folder / "config.json").read_text())
    save_file(base, tmp_path / "base" / "model.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal, load_folder(tmp_path / "base")[1], load_folder(folder)[1]
    )
    base["layers.0.self_attn.rotary_emb.inv_freq"] *= 2
    save_file(base, tmp_path / "base" / "model.safetensors")
    with pytest.raises(FormatError, match=r"inv_freq' is not the \(3,\) frequencies that rope_th"):
        load_folder(tmp_path / "base")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; known: silu"),
        ({"hidden_size": "24"}, "hidden_size is '24'; it must be of type int"),
        ({"num_key_value_heads": 3}, "these values make no model: num_kv_heads: 3 does not divide"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'; known: default"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, not"),
        ({"rope_parameters": {"rope_type": "linear"}}, "scaling 'linear' lacks factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, hi"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'; it must be a number"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .* full precision"),
        ({"intermediate_size": 41}, r"mlp\.gate_proj\.weight is \(40, 24\), not \(41, 24\)"),
        ({"num_hidden_layers": 2}, r"are missing: model\.layers\.1\..* and 1 more"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(folder, tmp_path, values, message):
    with pytest.raises(FormatError, match=f"^{tmp_path}/model.*: .*{message}"):
        load_folder(changed(folder, tmp_path / "model", **values))


def test_a_head_of_its_own_needs_a_config_that_says_so(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    same = changed(folder, tmp_path / "same", {"lm_head.weight": embedding})
    assert "head" not in load_folder(same)[1]["embedding"]
    other = changed(folder, tmp_path / "other", {"lm_head.weight": embedding * 2})
    with pytest.raises(FormatError, match=r"'lm_head\.weight' is not equal to .*tie_word_embedd"):
        load_folder(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert load_folder(other)[1]["embedding"]["head"].shape == (61, 24)


def test_windows_that_contradict_are_refused():
    values = {**SHAPE, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}
    with pytest.raises(FormatError, match="has sliding_attention, but use_sliding_window is False"):
        Qwen2().read_config(values)
    with pytest.raises(FormatError, match=r"it must name full_attention or .* num_hidden_layers=3"):
        Qwen2().read_config({**SHAPE, "layer_types": ["linear_attention"] * 3})


# ------------------------------------------------------------------------------
# Models of ours in these formats.

PLAIN = {"core_layers": 0, "coda_layers": 1, "width": 24, "vocab_size": 300}


def plain(**changes):
    return build({"model": merge(PLAIN, changes)}).model


def test_layers_of_prelude_and_coda_are_one_stack(tmp_path):
    lm = mt.create(plain(prelude_layers=2, tie_embeddings=False, norm={"eps": 1e-4}))
    lm.save(tmp_path / "llama", format="llama")
    again = mt.load(tmp_path / "llama")
    assert (again.config.prelude_layers, again.config.coda_layers) == (3, 0)
    np.testing.assert_array_equal(again(TOKENS).logits, lm(TOKENS).logits)
    with pytest.raises(UserError, match=r"qkv_bias: False, Qwen 2's is True") as error:
        lm.save(tmp_path / "qwen2", format="qwen2")
    assert str(error.value).endswith("Formats that can express it: llama.")
    with pytest.raises(UserError, match=r"format: 'lama' is unknown; known: 'run', 'huginn', 'gp"):
        lm.save(tmp_path / "lama", format="lama")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_windows_of_prelude_and_coda_are_those_of_one_stack():
    attention = {"prelude_windows": (4, 0), "coda_windows": (4,), "qkv_bias": True}
    config = plain(prelude_layers=2, attention=attention)
    values = config_to(Qwen2(), config)
    assert values["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert Qwen2().read_config(values).windows("prelude") == (4, None, 4)
    with pytest.raises(FormatError, match=r"prelude_windows: \[4, 0, 4\], Llama's is \[\]"):
        config_to(Llama(), config)
    same = plain(attention={"prelude_windows": (4,), "coda_windows": (4,), "qkv_bias": True})
    assert Qwen2().read_config(config_to(Qwen2(), same)).attention.window == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"core_layers": 1}, r"model\.core_layers: 1, Llama has no core"),
        (
            {"core_layers": 1, "value_embedding": {"layers": (2,), "gate_channels": 8}},
            r"model\.value_embedding\.layers: \[2\], Llama's is \[\]",
        ),
        (
            {"value_embedding": {"layers": (1,), "gate_channels": 8}},
            r"model\.value_embedding\.layers: \[1\], Llama's is \[\]",
        ),
        ({"norm": {"placement": "peri"}}, r"model\.norm\.placement: 'peri', Llama's is 'pre'"),
        (
            {"mlp": {"activation": "relu_squared_half"}},
            r"model\.mlp\.activation: 'relu_squared_half', Llama's is 'silu'",
        ),
        ({"scale_embeddings": True}, r"model\.scale_embeddings: True, Llama's is False"),
        ({"positions": {"scheme": "alibi"}}, r"model\.positions\.scheme: 'alibi', Llama's is"),
        ({"attention": {"output_bias": True}}, r"model\.attention\.output_bias: True, Llama's is"),
        (
            {"prelude_layers": 2, "sharing": {"scheme": "cycle", "prelude_unique": 1}},
            r"model\.sharing\.scheme: 'cycle', Llama's is 'none'",
        ),
    ],
    ids=str,
)
def test_what_the_format_cannot_express_is_named(changes, message):
    with pytest.raises(FormatError, match=rf"(?s)cannot be written as a Llama, .*{message}"):
        config_to(Llama(), plain(**changes))


def test_of_images_only_that_there_are_is_said():
    config = dataclasses.replace(plain(), image=ImageConfig(enabled=True))
    with pytest.raises(FormatError) as error:
        config_to(Llama(), config)
    assert str(error.value).count("model.image") == 1
    assert "model.image.enabled: True, Llama's is False" in str(error.value)


def test_rotary_scaling_comes_back():
    for scaling in (
        {"kind": "linear", "factor": 2.0},
        {"kind": "llama3", "factor": 8.0, "low_freq_factor": 2.0},
        {"kind": "yarn", "factor": 4.0, "attention_factor": 1.25, "truncate": False},
    ):
        config = plain(positions={"scaling": scaling})
        assert Llama().read_config(config_to(Llama(), config)).positions == config.positions
