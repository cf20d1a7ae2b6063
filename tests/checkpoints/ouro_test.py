"""Ouro folders: the same results as upstream's model at any size, and the same bytes back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_passes import empty_cache, in_passes, rule
from ouro_reference import THRESHOLDS, expected_of_ouro, last_step_reuse, make_ouro
from safetensors.numpy import load_file, save_file

import megatransformer_jax as mt
from megatransformer_jax.checkpoints.folders import load_folder
from megatransformer_jax.checkpoints.foreign import config_to
from megatransformer_jax.checkpoints.ouro import Ouro
from megatransformer_jax.checkpoints.tensor_map import FormatError, iterate_tensors
from megatransformer_jax.losses.tokens import token_loss

OURO = Ouro()
PUBLISHED = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "early_exit_threshold": 1.0,
}
SIZES = {
    "grouped": {
        "vocab_size": 61,
        "max_position_embeddings": 40,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "total_ut_steps": 3,
        "tie_word_embeddings": False,
    },
    "wide_heads": {
        "vocab_size": 40,
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 20,
        "rope_theta": 10_000.0,
        "total_ut_steps": 6,
        "tie_word_embeddings": True,
    },
}


def write(folder, values, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=["upstream", *SIZES])
def case(request, tmp_path_factory, repository):
    """(folder, what upstream computes) of one model."""
    if request.param == "upstream":
        folder = repository.parent / "shared" / "fixtures" / "ouro_tiny"
        if not folder.is_dir():
            pytest.skip(f"reference data is not here: {folder}")
        return folder, dict(np.load(folder / "expected.npz"))
    values = {**PUBLISHED, **SIZES[request.param]}
    tensors = make_ouro(values, seed=len(request.param))
    ids, labels = np.random.default_rng(1).integers(0, values["vocab_size"], (2, 2, 12))
    folder = write(tmp_path_factory.mktemp("ouro") / "model", values, tensors)
    expected = expected_of_ouro(values, tensors, ids, labels, new_tokens=12)
    return folder, {**expected, "input_ids": ids, "labels": labels}


@pytest.fixture(scope="module")
def lm(case):
    return mt.load(case[0])


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_states_gates_and_logits_agree_after_every_loop(case, lm):
    loops = lm.trained_depth
    assert f"hidden_loop{loops}" in case[1] and f"hidden_loop{loops + 1}" not in case[1]
    gate = jax.jit(lambda state: lm.module.apply({"params": lm.params}, state, method="run_gate"))
    for loop in range(1, loops + 1):
        output = lm(case[1]["input_ids"], depth=loop)
        close(output.latent, case[1][f"hidden_loop{loop}"])
        close(output.logits, case[1][f"logits_loop{loop}"])
        close(gate(output.latent), case[1][f"gate_logit_loop{loop}"])


def test_both_exits_agree(case, lm):
    _, expected = case
    ids, loops = expected["input_ids"], lm.trained_depth
    for threshold in THRESHOLDS:
        output = lm(ids, gate_readout="threshold", gate_threshold=threshold)
        close(output.logits, expected[f"logits_exit_threshold_{threshold}"])
    # Written out, because upstream heeds the config's threshold of 1 before it averages, so that
    # what was recorded as its weighted exit is the last loop's output.
    gates = [expected[f"gate_logit_loop{loop}"] for loop in range(1, loops + 1)]
    stop = 1 / (1 + np.exp(-np.asarray(gates, np.float64)))
    left = np.cumprod(1 - stop, axis=0)
    shares = np.concatenate([stop[:1], left[:-2] * stop[1:-1], left[-2:-1]])
    logits = np.asarray([expected[f"logits_loop{loop}"] for loop in range(1, loops + 1)])
    close(lm(ids, gate_readout="weighted").logits, (shares[..., None] * logits).sum(0))
    output = lm(ids, gate_readout="threshold", gate_threshold=1.0)
    close(output.logits, expected[f"logits_loop{loops}"])


def test_loss_and_every_gradient_agree(case, lm):
    _, expected = case
    tokens, labels = (jnp.asarray(expected[name], jnp.int32) for name in ("input_ids", "labels"))
    loops = lm.trained_depth

    def loss(params):
        output = lm.module.apply({"params": params}, tokens, num_steps=loops, backprop_depth=loops)
        sums = token_loss(output.logits, labels, jnp.ones(labels.shape))
        return sums.cross_entropy / sums.tokens

    value, gradients = jax.jit(jax.value_and_grad(loss))(lm.params)
    np.testing.assert_allclose(value, expected["loss_last_loop"], rtol=1e-6)
    ours = dict(iterate_tensors(jax.device_get(gradients), OURO.links(lm.config)))
    theirs = {
        name.removeprefix("grad/"): array
        for name, array in expected.items()
        if name.startswith("grad/")
    }
    # The loss does not read the gate.
    assert ours.keys() - theirs.keys() == {
        "model.early_exit_gate.weight",
        "model.early_exit_gate.bias",
    }
    for name, array in theirs.items():
        error = np.linalg.norm(ours[name] - array) / np.linalg.norm(array)
        assert error < 1e-4, (name, error)


def test_cached_greedy_tokens_are_those_of_recomputation(case, lm):
    _, expected = case
    prompts, wanted = expected["input_ids"], expected["greedy_all_loops"]
    count = wanted.shape[1] - prompts.shape[1]
    found = lm.generate(prompts, strategy="greedy", max_new_tokens=count)
    for row, completion in enumerate(found):
        np.testing.assert_array_equal(completion.token_ids, wanted[row, -count:])


def test_last_step_reuse_is_one_cache_slot(tmp_path):
    """Ouro, section on the KV cache: later tokens read the last loop's keys and values."""
    values = {**PUBLISHED, **SIZES["grouped"]}
    tensors = make_ouro(values, seed=7)
    lm = mt.load(write(tmp_path / "model", values, tensors))
    ids = np.random.default_rng(2).integers(0, 61, (2, 9))
    logits = {}
    for slots in (1, 3):
        cache = empty_cache(lm.config, 2, num_slots=slots)
        everything = jnp.ones(ids.shape, bool)
        arguments = (lm.module, lm.params, jnp.asarray(ids), everything, cache, rule(3))
        logits[slots] = in_passes(*arguments, [8, 1], begins=True)[0][:, -1:]
    close(logits[1], last_step_reuse(values, tensors, ids))
    assert np.abs(logits[1] - logits[3]).max() > 1e-2


def test_import_then_export_gives_the_same_bytes(case, lm, tmp_path):
    folder, _ = case
    saved = lm.save(tmp_path / "saved", format="ouro")
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, saved))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].tobytes() == tensor.tobytes(), name
    values, written = (json.loads((path / "config.json").read_text()) for path in (folder, saved))
    assert {name: written[name] for name in values if name in written and values[name]} == {
        name: value for name, value in values.items() if name in written and value
    }
    head_dim = lm.config.head_dim(lm.config.width)
    attention = dataclasses.replace(lm.config.attention, head_dim=head_dim)
    assert load_folder(saved)[0] == dataclasses.replace(lm.config, attention=attention)


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    values = {**PUBLISHED, **SIZES["grouped"]}
    tensors = make_ouro(values, seed=0)
    with pytest.raises(FormatError, match=r"early_exit_step is 2, not None"):
        OURO.read_config({**values, "early_exit_step": 2})
    with pytest.raises(FormatError, match=r"total_ut_steps is '4'; it must be of type int"):
        OURO.read_config({**values, "total_ut_steps": "4"})
    gateless = {name: tensor for name, tensor in tensors.items() if "gate.bias" not in name}
    with pytest.raises(FormatError, match=r"are missing: model\.early_exit_gate\.bias"):
        load_folder(write(tmp_path / "gateless", values, gateless))
    config = OURO.read_config(values)
    windows = {**values, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    assert OURO.read_config(windows).windows("core") == (None, 5)
    assert config_to(OURO, OURO.read_config(windows))["layer_types"][1] == "sliding_attention"
    recurrence = dataclasses.replace(config.recurrence, adapter="sum", head_norm=True)
    other = dataclasses.replace(config, recurrence=recurrence, coda_layers=1)
    with pytest.raises(FormatError) as caught:
        config_to(OURO, other)
    for line in (
        "model.coda_layers: 1, Ouro's is 0",
        "model.recurrence.adapter: 'sum', Ouro's is 'none'",
        "model.recurrence.head_norm: True, Ouro's is False",
    ):
        assert line in str(caught.value)
    plain = mt.create("tiny", core_layers=0, recurrence={"mean_steps": 8, "backprop_depth": 4})
    with pytest.raises(FormatError, match=r"model\.core_layers: 0, Ouro has a core"):
        config_to(OURO, plain.config)
