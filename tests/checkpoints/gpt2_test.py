"""GPT-2 computes what transformers' own class computes, and the files agree."""

import json

import jax
import numpy as np
import pytest
from foreign_models import (
    TOKENS,
    our_greedy,
    random_model,
    saved_by_transformers,
    their_greedy,
    their_logits,
)
from safetensors.numpy import load_file, save_file

import megatransformer_jax as mt
from megatransformer_jax.checkpoints.folders import load_folder
from megatransformer_jax.checkpoints.foreign import config_to
from megatransformer_jax.checkpoints.gpt2 import Gpt2
from megatransformer_jax.checkpoints.tensor_map import FormatError
from megatransformer_jax.config.build import build

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

SHAPE = {
    "vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64,
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = random_model(transformers.GPT2Config(**SHAPE))
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    model.save_pretrained(folder)
    return model, folder


def test_logits_tokens_and_files_agree(saved, tmp_path):
    model, folder = saved
    lm, theirs = mt.load(folder), their_logits(model)
    np.testing.assert_allclose(lm(TOKENS).logits, theirs, rtol=0, atol=1e-5)
    tokens = their_greedy(model)
    assert len(set(tokens)) > 3 and our_greedy(lm) == tokens
    lm.save(tmp_path / "ours", format="gpt2")
    ours, original = (load_file(path / "model.safetensors") for path in (tmp_path / "ours", folder))
    assert set(ours) == set(original)
    assert all(ours[name].tobytes() == tensor.tobytes() for name, tensor in original.items())
    np.testing.assert_array_equal(their_logits(saved_by_transformers(tmp_path / "ours")), theirs)


def test_other_options_agree(tmp_path):
    config = transformers.GPT2Config(
        **{**SHAPE, "n_layer": 1, "n_inner": 30}, activation_function="relu",
        tie_word_embeddings=False, layer_norm_epsilon=1e-3,
    )  # fmt: skip
    model = random_model(config, seed=1)
    model.save_pretrained(tmp_path / "theirs")
    lm, theirs = mt.load(tmp_path / "theirs"), their_logits(model)
    np.testing.assert_allclose(lm(TOKENS).logits, theirs, rtol=0, atol=1e-5)
    lm.save(tmp_path / "ours", format="gpt2")
    np.testing.assert_array_equal(their_logits(saved_by_transformers(tmp_path / "ours")), theirs)


def test_files_as_openai_published_them_are_read(saved, tmp_path):
    """Without a prefix, and with the causal masks, which some files have as whole numbers."""
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    base = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    base |= {
        f"h.{layer}.attn.bias": np.tri(64, dtype=[np.float32, np.uint8][layer])[None, None]
        for layer in range(2)
    }
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(base, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_folder(tmp_path)[1], load_folder(folder)[1])
    save_file({**base, "h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(FormatError, match=r"h\.0\.attn\.bias' is not the causal mask"):
        load_folder(tmp_path)


def test_the_preset_is_the_published_config():
    config = build({"preset": "gpt2_small"}).model
    values = config_to(Gpt2(), config)
    published = transformers.GPT2Config().to_dict()
    same = {key for key in values if values[key] == published.get(key)}
    # Dropout is left to the experiment, and the width of the hidden layer is its default there.
    assert set(values) - same == {
        "architectures", "n_ctx", "n_inner", "embd_pdrop", "resid_pdrop", "attn_pdrop"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, not"),
        ({"activation_function": "mish"}, "activation_function is 'mish'; known: silu"),
        ({"n_head": 5}, "these values make no model: width: 24 is not divisible"),
    ],
    ids=str,
)
def test_what_we_do_not_compute_is_refused(values, message):
    with pytest.raises(FormatError, match=f"^config.json: {message}"):
        Gpt2().read_config(json.loads(json.dumps({**SHAPE, **values})))
