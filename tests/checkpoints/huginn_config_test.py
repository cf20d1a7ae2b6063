"""config.json and our architecture say the same, or it is an error."""

import dataclasses
import json

import pytest
from huginn_values import HUGINN, huginn_values

from megatransformer_jax.checkpoints.foreign import config_to, dropped_options
from megatransformer_jax.checkpoints.tensor_map import FormatError
from megatransformer_jax.config.build import build, merge

# Options under which our models are Huginn's, and as few others as possible.
EXPORTABLE = {
    "width": 32,
    "scale_embeddings": True,
    "attention": {"num_heads": 4},
    "positions": {"rotary_convention": "interleaved"},
    "norm": {"placement": "sandwich"},
}


def model_config(changes):
    return build({"model": merge(EXPORTABLE, changes)}).model


def test_the_published_config_is_the_preset():
    published = {
        "architectures": ["RavenForCausalLM"], "n_embd": 5280, "n_heads": 55, "n_layers": 8,
        "num_key_value_heads": 55, "head_dim": 96, "intermediate_size": 17920,
        "vocab_size": 65536, "padded_vocab_size": 65536, "padding_multiple": 4096,
        "n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2,
        "injection_type": "linear", "state_init": "like-init", "mean_recurrence": 32,
        "mean_backprop_depth": 8, "effective_expected_depth": 132, "norm_eps": 1e-6,
        "qk_bias": True, "tie_embeddings": True, "rope_base": 50000, "block_size": 4096,
        "bias": False, "init_strategy": "takase", "init_orthogonal": False,
        "block_class_name": "SandwichBlock", "norm_class_name": "RMSNorm_llama",
        "mlp_class_name": "GatedMLP", "nonlin_name": "SiLU", "test_time_noise": 0,
        "test_time_noise_type": "fixed", "model_type": "huginn_raven",
        "sampling_scheme": "poisson-lognormal-filling", "activation_checkpoint_impl": "per-iter",
        "init_values": {"std": 0.008703882797784892, "embed_scale": 72.6636084983398},
    }  # fmt: skip
    # What is recomputed suits the machine of the preset; the format does not say it.
    preset = dataclasses.replace(build({"preset": "huginn_3_5b"}).model, remat="none")
    config = HUGINN.read_config(published)
    attention = dataclasses.replace(config.attention, head_dim=96)
    assert dataclasses.replace(config, attention=attention) == preset
    written = config_to(HUGINN, preset)
    assert {key: published.get(key, value) for key, value in written.items()} == written
    assert dropped_options(HUGINN, preset) == []


def test_the_fixture_comes_back(huginn_fixture):
    values = json.loads((huginn_fixture / "config.json").read_text())
    written = config_to(HUGINN, HUGINN.read_config(values))
    assert {key: written[key] for key in values} == values


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"state_init": "zero"},
        {"num_key_value_heads": 2, "qk_bias": False},
        {"rope_base": 10000.5, "norm_eps": 1e-5},
        {"mean_recurrence": 100, "mean_backprop_depth": 90},
        {"n_layers_in_prelude": 0, "n_layers_in_coda": 3},
    ],
)
def test_values_come_back(changes):
    values = huginn_values(**changes)
    config = HUGINN.read_config(values)
    written = config_to(HUGINN, config)
    assert {key: written[key] for key in values} == values
    assert HUGINN.read_config(written) == config


def test_other_names_mean_the_same():
    values = huginn_values()
    values["n_heads"] = values.pop("num_attention_heads")
    values["vocab_size"] = values.pop("padded_vocab_size")
    del values["num_key_value_heads"]
    assert HUGINN.read_config(values) == HUGINN.read_config(huginn_values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonlin_name": "GELU"}, "nonlin_name is 'GELU', not 'SiLU'"),
        ({"bias": True}, "bias is True, not False"),
        ({"model_type": "llama"}, "model_type is 'llama', not 'huginn_raven'"),
        ({"tie_embeddings": False}, "tie_embeddings is False"),
        ({"injection_type": "add"}, "injection_type is 'add'"),
        ({"state_init": "learned"}, "state_init is 'learned'; known: like-init, normal, zero"),
        ({"n_embd": "32"}, "n_embd is '32'; it must be of type int"),
        ({"n_embd": 33}, "these values make no model: width: 33 is not divisible"),
        ({"block_size": 0}, "these values make no model: max_length: 0"),
        ({"qk_bias": 1}, "qk_bias is 1; it must be of type bool"),
        ({"norm_eps": True}, "norm_eps is True; it must be of type float"),
        ({"num_key_value_heads": 2}, "qk_bias with num_key_value_heads=2 is not defined"),
        ({"n_heads": 8}, "n_heads=8 contradicts num_attention_heads=4"),
        ({"test_time_noise": 0.1}, "test_time_noise is 0.1; noise"),
        ({"init_values": {"embed_scale": 1.0}}, r"init_values\.embed_scale is 1\.0; only the 5\.6"),
        ({"init_values": {"std": 0.02}}, r"init_values\.std is 0\.02; only the 0\.1118"),
        ({"init_values": {"std": None}}, r"init_values\.std is None"),
        ({"init_values": 3}, r"init_values\.embed_scale is 3"),
    ],
)
def test_what_we_do_not_compute_is_refused(changes, message):
    with pytest.raises(FormatError, match=f"^folder/config.json: {message}"):
        HUGINN.read_config(huginn_values(**changes), "folder/config.json")


def test_missing_keys_are_listed():
    values = huginn_values()
    for key in ("qk_bias", "n_embd"):
        del values[key]
    with pytest.raises(FormatError, match=r"config\.json: lacks n_embd, qk_bias; copy the"):
        HUGINN.read_config(values)
    with pytest.raises(FormatError, match="lacks n_embd, num_attention_heads, inter"):
        HUGINN.read_config({})


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"tie_embeddings": False}, ["model.tie_embeddings: False, Huginn's is True"]),
        ({"attention": {"qk_norm": True}}, ["model.attention.qk_norm: True, Huginn's is False"]),
        ({"attention": {"window": 8}}, ["model.attention.window: 8, Huginn's is None"]),
        ({"logit_softcap": 30.0}, ["model.logit_softcap: 30.0, Huginn's is None"]),
        ({"attention": {"head_dim": 6}}, ["model.attention.head_dim: 6, Huginn's is 8"]),
        (
            {"recurrence": {"core_width": 16}},
            ["model.recurrence.core_width: 16, Huginn's is 32"],
        ),
        (
            {"recurrence": {"state_init": "embed"}},
            ["model.recurrence.state_init: 'embed', Huginn's is 'like_init'"],
        ),
        (
            {"core_layers": 2, "sharing": {"scheme": "cycle", "core_unique": 1}},
            [
                "model.sharing.scheme: 'cycle', Huginn's is 'none'",
                "model.sharing.core_unique: 1, Huginn's is None",
            ],
        ),
        ({"init": {"scheme": "scaled"}}, ["model.init.scheme: 'scaled', Huginn's is 'takase'"]),
        ({"core_layers": 0}, ["model.core_layers: 0, Huginn has a core"]),
        (
            {"attention": {"qk_bias": True, "num_kv_heads": 2}},
            ["model.attention.num_kv_heads: 2, with qk_bias Huginn has as many as query heads, 4"],
        ),
        (
            {"width": 30, "attention": {"head_dim": 8}},
            ["model.width: 30 is not divisible by attention.num_heads=4;"],
        ),
        (
            {
                "norm": {"placement": "pre"},
                "mlp": {"activation": "gelu"},
                "recurrence": {"adapter": "diagonal", "injection_norm": True},
            },
            [
                "model.norm.placement: 'pre', Huginn's is 'sandwich'",
                "model.mlp.activation: 'gelu', Huginn's is 'silu'",
                "model.recurrence.adapter: 'diagonal', Huginn's is 'linear'",
                "model.recurrence.injection_norm: True, Huginn's is False",
            ],
        ),
    ],
    ids=str,
)
def test_what_huginn_does_not_compute_is_listed(changes, lines):
    with pytest.raises(FormatError, match="cannot be written as a Huginn") as error:
        config_to(HUGINN, model_config(changes))
    found = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    assert len(found) == len(lines)
    assert all(line.startswith(wanted) for line, wanted in zip(found, lines, strict=True))


def test_what_only_training_read_is_dropped_by_name():
    config = model_config(
        {
            "residual_dropout_rate": 0.1,
            "remat": "full",
            "init": {"scheme": "scaled"},
            "recurrence": {"state_init": "zero", "sampling": "fixed", "mean_steps": 8},
        }
    )
    back = HUGINN.read_config(config_to(HUGINN, config))
    assert back.recurrence.mean_steps == 8 and back.recurrence.state_init == "zero"
    assert dropped_options(HUGINN, config) == [
        "model.residual_dropout_rate=0.1",
        "model.remat='full'",
        "model.init.scheme='scaled'",
        "model.recurrence.sampling='fixed'",
    ]
