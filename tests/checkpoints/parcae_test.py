"""Parcae folders: the same results as in PyTorch, and the same bytes back."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_passes import empty_cache, in_passes, rule
from foreign_gradients import check_truncated_gradients
from safetensors.numpy import load_file, save_file

from megatransformer_jax.checkpoints.folders import (
    format_named,
    load_folder,
    open_folder,
    save_folder,
)
from megatransformer_jax.checkpoints.parcae import PICKLES, Parcae
from megatransformer_jax.checkpoints.tensor_map import FormatError
from megatransformer_jax.config.build import build
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

torch = pytest.importorskip("torch")
from parcae_reference import DIAGONAL, LINEAR, Reference  # noqa: E402  (It imports torch.)

PARCAE = Parcae()
DEPTHS = (1, 4, 8, 16)
LENGTH = 12
MADE = {"diagonal": (DIAGONAL, 1), "linear": (LINEAR, 2)}


def written(folder, reference):
    """The reference as a folder of safetensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(reference.values))
    save_file({n: t.numpy() for n, t in reference.tensors.items()}, folder / "model.safetensors")
    return folder


def computed(reference):
    """What the fixture's expected.npz has, by the reference."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, reference.values["vocab_size"], (2, LENGTH), generator=rng)
    labels = torch.randint(0, reference.values["vocab_size"], (2, LENGTH), generator=rng)
    state = 0.3 * torch.randn(2, LENGTH, reference.width, generator=rng)
    found = {"input_ids": tokens, "labels": labels, "initial_state": state}
    found |= {f"logits_r{n}": reference.logits(tokens, state, n) for n in DEPTHS}
    for tensor in reference.tensors.values():
        tensor.requires_grad_(True)
    logits = reference.logits(tokens, state, 4, 4)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    found |= {"loss_n4_k4": loss}
    for name, tensor in reference.tensors.items():
        tensor.requires_grad_(False)
        if tensor.grad is not None:
            found[f"grad_n4_k4/{name}"] = tensor.grad
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


@functools.cache
def made(name):
    values, seed = MADE[name]
    return Reference(values, seed)


@pytest.fixture(scope="module", params=["published", *MADE])
def folder(request, tmp_path_factory):
    if request.param == "published":
        return request.getfixturevalue("parcae_fixture")
    return written(tmp_path_factory.mktemp("parcae") / request.param, made(request.param))


@pytest.fixture(scope="module")
def expected(folder):
    if folder.name in MADE:
        return computed(made(folder.name))
    return dict(np.load(folder / "expected.npz"))


@pytest.fixture(scope="module")
def loaded(folder):
    config, params = load_folder(folder)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    return model, jax.tree.map(jnp.asarray, params)


def test_the_preset_is_the_published_model():
    """The values of upstream's configuration of its 140M model."""
    published = {
        "_class_name": "ParcaeConfig",
        "vocab_size": 32768,
        "padding_multiple": 64,
        "block_size": 2048,
        "n_embd": 768,
        "num_attention_heads": 6,
        "intermediate_size": 3072,
        "n_layers_in_prelude": 2,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 2,
        "mean_recurrence": 8,
        "mean_backprop_depth": 4,
        "recurrent_embedding_dimension": 768,
        "recurrent_intermediation_embedding_dimension": 3072,
        "norm_class_name": "RMSNorm",
        "nonlin_name": "ReLU2",
        "qk_norm": True,
        "prelude_norm": True,
        "tie_embeddings": True,
        "init_strategy": "scaled-zero",
        "recurrent_iteration_method": "per-sequence",
    }
    model = build({"preset": "parcae_140m"}).model
    assert PARCAE.read_config(published) == model
    assert PARCAE.read_config(PARCAE.write_config(model)) == model


def test_logits_agree(loaded, expected):
    model, params = loaded
    tokens = jnp.asarray(expected["input_ids"], jnp.int32)
    state = jnp.asarray(expected["initial_state"])

    @jax.jit
    def logits(num_steps):
        return model.apply({"params": params}, tokens, num_steps=num_steps, state=state).logits

    for depth in DEPTHS:
        wanted = expected[f"logits_r{depth}"]
        np.testing.assert_allclose(logits(jnp.int32(depth)), wanted, rtol=0, atol=2e-5)


def test_loss_and_every_gradient_agree_under_truncated_backprop(loaded, expected):
    model, params = loaded
    check_truncated_gradients(model, params, expected, PARCAE, loss_rtol=2e-6)


def test_import_then_export_gives_the_same_bytes(folder, tmp_path):
    config, params = load_folder(folder)
    save_folder(tmp_path / "out", PARCAE, config, params)
    original = load_file(folder / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    # Upstream makes these and never reads them. Its table of rotations follows from config.json.
    unread = {
        "diagonal": {
            "value_embeds.0.weight",
            "value_embeds.2.weight",
            "transformer.prelude.1.attn.ve_gate.weight",
        }
    }.get(folder.name, set())
    assert original.keys() - exported.keys() == unread
    assert exported.keys() - original.keys() == (
        {"freqs_cis"} if folder.name == "linear" else set()
    )
    for name in exported.keys() & original.keys():
        assert exported[name].tobytes() == original[name].tobytes(), name
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "torch_dtype" not in values
    again, _ = load_folder(tmp_path / "out")
    assert again == config


def test_a_cache_equals_recomputation(tmp_path):
    config, params = load_folder(written(tmp_path / "model", made("linear")))
    params = jax.tree.map(jnp.asarray, params)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 40)
    wanted = jax.jit(
        lambda tokens: model.apply({"params": params}, tokens, num_steps=jnp.int32(3)).logits
    )(tokens)
    cache = empty_cache(config, 2, num_slots=3)
    everything = jnp.ones(tokens.shape, bool)
    got, *_ = in_passes(model, params, tokens, everything, cache, rule(3), [3] * 3, begins=True)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------
# Pickles.


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pickle_of_tensors_is_read(tmp_path, name, dtype):
    reference = made("diagonal")
    folder = written(tmp_path / "model", reference)
    _, wanted = load_folder(folder)
    (folder / "model.safetensors").unlink()
    tied = {"lm_head.weight": reference.tensors["transformer.wte.weight"]}
    tensors = {n: t.to(dtype) for n, t in (reference.tensors | tied).items()}
    torch.save(tensors, folder / name)
    _, params = load_folder(folder, param_dtype="stored")
    rounded = jnp.bfloat16 if dtype == torch.bfloat16 else jnp.float32
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(rounded)), params, wanted)


class Runs:
    """Something that would run code."""

    def __reduce__(self):
        return print, ("this ran",)


def test_pickles_that_cannot_be_read_are_refused(tmp_path, monkeypatch, capsys):
    folder = written(tmp_path / "model", made("diagonal"))
    (folder / "model.safetensors").unlink()
    path = folder / PICKLES[0]
    for content, message in (
        ({"a": Runs()}, r"weights_only=True\) refuses it"),
        ({"model": {"a": torch.ones(1)}}, "does not map names to tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(FormatError, match=message):
            open_folder(folder)
    assert "this ran" not in capsys.readouterr().out
    path.write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="refuses it"):
        open_folder(folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(FormatError, match=r"pip install torch.*save_file"):
        open_folder(folder)


# ------------------------------------------------------------------------------
# What cannot be read or written.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_key_value_heads": 1},
            "num_key_value_heads is 1, but num_attention_heads is 2; Parc",
        ),
        ({"recurrent_embedding_dimension": 64}, "recurrent_embedding_dimension is 64, but n_embd"),
        ({"init_strategy": "shaped"}, "init_strategy is 'shaped'; supported: scaled, takase"),
        ({"bias": True}, "bias is True, not False"),
        ({"n_layers_in_recurrent_block": 0}, "Parcae has a core"),
        ({"rope_settings": {"rope_base": "x"}}, "rope_settings.rope_base is 'x'; it must be of"),
        ({"n_embd": 3, "recurrent_embedding_dimension": 3}, "these values make no model: width: 3"),
    ],
)
def test_unsupported_configs_are_named(changes, message):
    with pytest.raises(FormatError, match=message):
        PARCAE.read_config(DIAGONAL | changes)


def test_what_the_format_cannot_express_is_named(tmp_path):
    config, params = load_folder(written(tmp_path / "model", made("diagonal")))
    config = dataclasses.replace(
        config,
        attention=dataclasses.replace(config.attention, window=4, output_bias=True),
        value_embedding=dataclasses.replace(config.value_embedding, layers=(1, 3)),
    )
    with pytest.raises(FormatError) as error:
        save_folder(tmp_path / "out", PARCAE, config, params)
    for line in (
        "model.attention.window: 4, Parcae's is None",
        "model.attention.output_bias: True, Parcae's is False",
        "model.value_embedding.layers: [1, 3], Parcae's is [4]",
    ):
        assert line in str(error.value)
    with pytest.raises(FormatError, match=r"value_embedding.layers: \[1, 3\], Llama's is \[\]"):
        save_folder(tmp_path / "out", format_named("llama"), config, params)


def test_a_table_of_rotations_is_compared_with_the_config(tmp_path):
    folder = written(tmp_path / "model", made("diagonal"))
    tensors = load_file(folder / "model.safetensors")
    config = open_folder(folder).config
    table = np.zeros((1, config.max_length, 1, 8, 2), np.float32)
    save_file(tensors | {"freqs_cis": table}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"'freqs_cis' is .* not the table of rotations"):
        load_folder(folder)
