"""Huginn folders: the same results as Huginn's own PyTorch model, and the same bytes back."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from foreign_gradients import check_truncated_gradients
from huginn_values import HUGINN, huginn_values, small_huginn
from safetensors.numpy import load_file, save_file

from megatransformer_jax.checkpoints.folders import FolderTokenizer, load_folder, save_folder
from megatransformer_jax.checkpoints.huginn import Huginn
from megatransformer_jax.checkpoints.safetensors_files import SafetensorsReader, WeightsFileError
from megatransformer_jax.checkpoints.tensor_map import FormatError
from megatransformer_jax.config.option import UserError
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


@pytest.fixture(scope="module")
def reference(huginn_fixture):
    config, params = load_folder(huginn_fixture)
    params = jax.tree.map(jnp.asarray, params)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    return model, params, np.load(huginn_fixture / "expected.npz")


@pytest.fixture(scope="module")
def forward(reference):
    model, params, expected = reference
    tokens = jnp.asarray(expected["input_ids"], jnp.int32)
    state = jnp.asarray(expected["initial_state"])
    return jax.jit(
        lambda num_steps: model.apply({"params": params}, tokens, num_steps=num_steps, state=state)
    )


@pytest.mark.parametrize("num_steps", [1, 4, 8, 16])
def test_logits_and_latents_agree(forward, reference, num_steps):
    expected = reference[2]
    output = forward(jnp.int32(num_steps))
    np.testing.assert_allclose(output.logits, expected[f"logits_r{num_steps}"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(output.latent, expected[f"latent_r{num_steps}"], rtol=0, atol=2e-5)


def test_loss_and_every_gradient_agree_under_truncated_backprop(reference):
    model, params, expected = reference
    check_truncated_gradients(model, params, expected, HUGINN, loss_rtol=1e-6)


@pytest.mark.parametrize("max_shard_bytes", [5 * 2**30, 300_000])
def test_import_then_export_gives_the_same_bytes(huginn_fixture, tmp_path, max_shard_bytes):
    config, params = load_folder(huginn_fixture)
    save_folder(tmp_path / "out", HUGINN, config, params, max_shard_bytes=max_shard_bytes)
    original = load_file(huginn_fixture / "model.safetensors")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == (1 if max_shard_bytes > 10**6 else 5)
    exported = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(exported) == set(original)
    for name, tensor in original.items():
        assert exported[name].dtype == tensor.dtype
        assert exported[name].tobytes() == tensor.tobytes(), name
    values = json.loads((huginn_fixture / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in values} == values


@pytest.fixture
def folder(tmp_path):
    config, params = small_huginn()
    save_folder(tmp_path / "model", HUGINN, config, params)
    return tmp_path / "model"


def load_leaves(folder, **options):
    return jax.tree.leaves(load_folder(folder, **options)[1])


def rounded(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def test_what_was_saved_is_loaded(folder):
    config, params = load_folder(folder)
    assert config == small_huginn()[0]
    jax.tree.map(np.testing.assert_array_equal, params, small_huginn()[1])
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_jax_arrays_are_saved_the_same(folder, tmp_path):
    config, params = small_huginn()
    save_folder(tmp_path / "again", HUGINN, config, jax.tree.map(jnp.asarray, params))
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_short_weights_are_converted_exactly_and_the_log_says_so(tmp_path, dtype, caplog):
    config, params = small_huginn()
    short = rounded(params, dtype)
    save_folder(tmp_path / "model", HUGINN, config, short)
    with caplog.at_level("INFO", logger="absl"):
        _, loaded = load_folder(tmp_path / "model")
    assert f"are stored as {np.dtype(dtype).name} and converted to float32" in caplog.text
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded(short, np.float32))
    # And back: the same bytes as before.
    save_folder(tmp_path / "back", HUGINN, config, loaded, dtype=np.dtype(dtype).name)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_stored_types_may_be_kept(tmp_path, caplog):
    config, params = small_huginn()
    mixed = rounded(params, ml_dtypes.bfloat16)
    mixed["final_norm"] = params["final_norm"]
    save_folder(tmp_path / "model", HUGINN, config, mixed)
    with caplog.at_level("INFO", logger="absl"):
        _, loaded = load_folder(tmp_path / "model", param_dtype="stored")
    assert "converted" not in caplog.text
    jax.tree.map(np.testing.assert_array_equal, loaded, mixed)
    assert jax.tree.map(np.dtype, jax.tree.map(lambda leaf: leaf.dtype, loaded)) == (
        jax.tree.map(lambda leaf: leaf.dtype, mixed)
    )


@pytest.mark.parametrize(("dtype", "name"), [(None, "float32"), ("bfloat16", "bfloat16")])
def test_the_config_names_the_type(tmp_path, dtype, name):
    config, params = small_huginn()
    save_folder(tmp_path / "model", Huginn(with_rotary_table=True), config, params, dtype=dtype)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["torch_dtype"] == name
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    # The table stays precise, as upstream keeps it.
    assert tensors.pop("freqs_cis").dtype == np.float32
    assert {tensor.dtype.name for tensor in tensors.values()} == {name}
    assert len(load_leaves(tmp_path / "model")) == len(jax.tree.leaves(params))


def test_values_that_a_type_cannot_hold_are_refused(tmp_path):
    config, params = small_huginn()
    params = jax.tree.map(lambda leaf: leaf * 1e9, params)
    with pytest.raises(UserError, match=r"'transformer.wte.weight' has values up to .*e\+08, whic"):
        save_folder(tmp_path / "model", HUGINN, config, params, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_and_special_ids_go_along(tmp_path):
    config, params = small_huginn()
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    save_folder(
        tmp_path / "model",
        HUGINN,
        config,
        params,
        tokenizer=FolderTokenizer(ids, {"tokenizer.model": b"pieces"}),
    )
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == ids
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == b"pieces"


def test_a_failure_leaves_nothing_behind(tmp_path, folder):
    config, params = small_huginn()
    broken = {**params, "final_norm": {}}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"only the format has: .'final_norm/scale'"):
        save_folder(tmp_path / "new", HUGINN, config, broken)
    with pytest.raises(ValueError, match=r"only the format has: .'final_norm/scale'"):
        save_folder(folder, HUGINN, config, broken, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_older_export_is_replaced_as_a_whole_only_if_told(tmp_path, folder):
    config, params = small_huginn()
    with pytest.raises(UserError, match=r"is not empty \(it has config\.json\); name a new folder"):
        save_folder(folder, HUGINN, config, params)
    save_folder(folder, HUGINN, config, params, max_shard_bytes=20_000, overwrite=True)
    assert "model.safetensors" not in os.listdir(folder)
    assert len(load_leaves(folder)) == len(jax.tree.leaves(params))
    save_folder(folder, HUGINN, config, params, overwrite=True)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    (folder / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"has 'thesis\.tex', which is not part of an export"):
        save_folder(folder, HUGINN, config, params, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    save_folder(tmp_path / "model", HUGINN, *small_huginn())
    assert load_leaves(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0; it must be at least 1"),
        ({"dtype": "int8"}, "dtype is 'int8'; known: float32, bfloat16, float16"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        save_folder(tmp_path / "model", HUGINN, *small_huginn(), **options)


def test_places_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file; name a new folder"):
        save_folder(tmp_path / "file", HUGINN, *small_huginn())
    with pytest.raises(UserError, match=r"absent does not exist; make it first"):
        save_folder(tmp_path / "absent" / "model", HUGINN, *small_huginn())


def test_damaged_folders_are_one_clear_error(folder):
    config_file, weights = folder / "config.json", folder / "model.safetensors"
    values = config_file.read_text()
    config_file.write_text(json.dumps(huginn_values(intermediate_size=50)))
    with pytest.raises(FormatError, match=r"model: .*mlp\.fc\.weight is \(96, 32\), not \(100"):
        load_folder(folder)
    config_file.write_text(values[:-20])
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        load_folder(folder)
    config_file.unlink()
    with pytest.raises(FormatError, match=r"config\.json does not exist; name a folder"):
        load_folder(folder)
    config_file.write_text(values)
    tensors = load_file(weights)
    save_file({**tensors, "transformer.ln_f.weight": np.ones(32, np.int8)}, weights)
    with pytest.raises(FormatError, match=r"ln_f\.weight' is of type I8; .* not quantised"):
        load_folder(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsFileError, match=r"model\.safetensors: is damaged or cut off, 1,000"):
        load_folder(folder)
    weights.unlink()
    with pytest.raises(WeightsFileError, match=r"model\.safetensors does not exist"):
        load_folder(folder)


def test_reading_holds_one_layer_at_a_time(folder, monkeypatch):
    """A parameter is placed before the tensors of later layers are read."""
    events = []
    read = SafetensorsReader.__getitem__
    monkeypatch.setattr(
        SafetensorsReader,
        "__getitem__",
        lambda self, name: events.append(name) or read(self, name),
    )
    load_folder(folder, place=lambda path, tensor: events.append("placed"))
    first_coda = next(i for i, name in enumerate(events) if "coda" in name)
    placed_before = events[:first_coda].count("placed")
    # Embedding, norm, two halves of the adapter, and ten of each of the three layers before it.
    assert placed_before == 4 + 3 * 10
