"""A run's checkpoint, or a Huginn folder, becomes a model with its tokenizer."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from written_run import write_run

from megatransformer_jax.checkpoints.folders import save_folder
from megatransformer_jax.checkpoints.huginn import Huginn
from megatransformer_jax.config.build import build, merge, save_config
from megatransformer_jax.config.loop import ModelMeshConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.reasoning.symbol_tokenizer import SymbolTokenizer
from megatransformer_jax.data.tokenizer import BytesTokenizer, SentencePieceTokenizer
from megatransformer_jax.model import Model
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.runs.load import load_model, parse_step
from megatransformer_jax.runs.train import train
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.evaluation_params import evaluation_params
from megatransformer_jax.types import DTypePolicy

LOSSES = {4: 2.0, 8: 1.0, 12: 3.0}


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), right)


@pytest.fixture(scope="module")
def sentencepiece_run(tmp_path_factory, small_run):
    """A run whose data is gone, with a tokenizer that it trained."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "data.jsonl"
    data.write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 50)
    changes = {
        "model": {"vocab_size": 320},
        "data": {
            "source": "jsonl", "files": [str(data)], "validation_fraction": 0.1,
            "tokenizer": {"kind": "sentencepiece"},
        },
        "checkpoint": {"keep_last": 3},
    }  # fmt: skip
    values = merge(small_run(folder / "run"), changes)
    values["data"]["tokenizer"]["vocab_size"] = None
    params = write_run(build(values), LOSSES)
    data.unlink()
    return folder / "run", params


@pytest.fixture(scope="module")
def huginn_folder(tmp_path_factory):
    config = build(
        {
            "model": {
                "vocab_size": 320, "width": 16, "core_layers": 1, "scale_embeddings": True,
                "attention": {"num_heads": 2}, "mlp": {"hidden_width": 16},
                "norm": {"placement": "sandwich"},
                "positions": {"rotary_convention": "interleaved"},
                "recurrence": {"mean_steps": 3},
            }
        }
    ).model  # fmt: skip
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    params = jax.device_get(init_params(model, jax.random.key(0)))
    folder = tmp_path_factory.mktemp("huginn") / "model"
    save_folder(folder, Huginn(), config, params)
    return folder, config, params


@pytest.mark.parametrize(
    ("step", "number"), [("latest", 12), ("best", 8), (4, 4), ("4", 4)], ids=str
)
def test_a_run_is_read_without_its_data(sentencepiece_run, step, number):
    workdir, params = sentencepiece_run
    loaded = load_model(workdir, step=step)
    assert_same(loaded.params, params[number])
    assert loaded.trained_depth == 2
    assert loaded.config.width == 16
    assert isinstance(loaded.tokenizer, SentencePieceTokenizer)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("the lazy fox")) == "the lazy fox"
    assert f"{workdir}, step {number}" in loaded.description


def test_what_training_has_written_is_read(tmp_path, small_run):
    """With an average of the weights it is the average, as in validation and samples."""
    config = build(small_run(tmp_path, {"train": {"ema_decay": 0.9}}))
    result = train(config)
    loaded = load_model(tmp_path)
    average = jax.device_get(evaluation_params(result.state, config))
    assert_same(loaded.params, average)
    last = jax.device_get(result.state.params)
    raw = load_model(tmp_path, weights="raw")
    assert_same(raw.params, last)
    assert raw.description.endswith("step 12 (latest), raw weights")
    assert np.abs(average["embedding"]["embedding"] - last["embedding"]["embedding"]).max() > 1e-4
    assert isinstance(loaded.tokenizer, BytesTokenizer)
    assert loaded.description == f"run {tmp_path}, step 12 (latest), average weights"


def test_it_computes_on_one_device_without_a_mesh(sentencepiece_run):
    loaded = load_model(sentencepiece_run[0])
    devices = {device for leaf in jax.tree.leaves(loaded.params) for device in leaf.devices()}
    assert devices == {jax.local_devices()[0]}
    tokens = jnp.ones((1, 3), jnp.int32)
    output = loaded.model.apply(
        {"params": loaded.params}, tokens, num_steps=1, rngs={"state": jax.random.key(0)}
    )
    assert output.logits.shape == (1, 3, 320)


def test_reading_changes_nothing_in_the_workdir(sentencepiece_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(sentencepiece_run[0], workdir)
    # A save and a deletion that are going on.
    (workdir / "checkpoints" / "16.orbax-checkpoint-tmp-1").mkdir()
    (workdir / "checkpoints" / "deleted").mkdir()
    before = sorted(path for path in workdir.rglob("*"))
    load_model(workdir)
    assert sorted(path for path in workdir.rglob("*")) == before


def test_precision_is_the_runs_or_the_callers(sentencepiece_run):
    assert load_model(sentencepiece_run[0]).model.policy.compute == jnp.float32
    loaded = load_model(sentencepiece_run[0], precision="bfloat16")
    assert loaded.model.policy.compute == jnp.bfloat16
    # The parameters stay on the host; the device has what passes compute with.
    leaves = jax.tree.leaves(loaded.params)
    assert {(type(leaf), leaf.dtype) for leaf in leaves} == {(np.ndarray, jnp.dtype(jnp.float32))}
    assert loaded.weights["embedding"]["embedding"].dtype == jnp.bfloat16
    assert loaded.weights["final_norm"]["scale"].dtype == jnp.float32
    assert loaded.weights is loaded.weights
    with pytest.raises(
        UserError, match=r"precision: 'half' is unknown; known: auto, float32, bfloat16"
    ):
        load_model(sentencepiece_run[0], precision="half")


def test_a_kernel_of_another_device_is_not_asked_for(tmp_path, small_run, caplog):
    values = small_run(tmp_path, {"model": {"attention": {"kernel": "xla"}}})
    write_run(build(values), {1: None})
    with caplog.at_level("INFO", logger="absl"):
        loaded = load_model(tmp_path)
    assert loaded.model.config.attention.kernel == "auto"
    assert "attention.kernel=xla of the run is auto for generation" in caplog.text


@pytest.mark.parametrize("step", ["newest", "-1", "", -1, True, 1.5])
def test_a_step_that_is_none_is_refused(step):
    with pytest.raises(UserError, match="give latest, best, or the number of a step"):
        parse_step(step)


def test_a_step_that_is_not_there_lists_those_that_are(sentencepiece_run):
    with pytest.raises(UserError, match=r"step=7: .* it has the steps 4, 8, 12\."):
        load_model(sentencepiece_run[0], step=7)


def test_the_best_of_none_validated_is_an_error(tmp_path, small_run):
    write_run(build(small_run(tmp_path)), {1: None})
    with pytest.raises(UserError, match=r"has a finite validation/loss; name one of the steps 1\."):
        load_model(tmp_path, step="best")
    assert isinstance(load_model(tmp_path).tokenizer, BytesTokenizer)


def test_a_missing_or_changed_tokenizer_is_an_error(sentencepiece_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(sentencepiece_run[0], workdir)
    path = workdir / "tokenizer.model"
    model = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model does not exist; .* Copy it from"):
        load_model(workdir)
    # Another model: one more (unknown) field at the end of the file.
    path.write_bytes(model + b"\x90\x4e\x01")
    with pytest.raises(UserError, match="is not the tokenizer that the run was trained with"):
        load_model(workdir)


def test_a_tokenizer_of_another_place_may_move_into_the_workdir(
    sentencepiece_run, tmp_path, small_run
):
    model_file = tmp_path / "mine.model"
    shutil.copy(sentencepiece_run[0] / "tokenizer.model", model_file)
    tokenizer = {"kind": "sentencepiece", "model_file": str(model_file)}
    workdir = tmp_path / "run"
    values = small_run(workdir, {"model": {"vocab_size": 320}, "data": {"tokenizer": tokenizer}})
    write_run(build(values), {1: None})
    digest = load_model(workdir).tokenizer.digest()
    model_file.rename(workdir / "other.model")
    with pytest.raises(UserError, match=r"mine\.model, does not exist; copy it to .*tokenizer\.mo"):
        load_model(workdir)
    (workdir / "other.model").rename(workdir / "tokenizer.model")
    assert load_model(workdir).tokenizer.digest() == digest


def test_a_reasoning_run_has_its_symbols(tmp_path, small_run):
    values = small_run(tmp_path)
    values["data"] = {
        "source": "reasoning", "batch_size": 8, "sequence_length": 32,
        "reasoning": {
            "task": "addition", "max_length": 4, "eval_min_length": 5, "eval_max_length": 6
        },
    }  # fmt: skip
    write_run(build(values), {1: None})
    tokenizer = load_model(tmp_path).tokenizer
    assert isinstance(tokenizer, SymbolTokenizer)
    assert tokenizer.encode("71 + 50 =") == [12, 6, 3, 10, 5, 4]
    # The symbols of a version to come.
    checkpoint = tmp_path / "checkpoints" / "1" / "run" / "metadata"
    checkpoint.write_text(checkpoint.read_text().replace("<pad> <s>", "<pad> <bos>"))
    with pytest.raises(UserError, match="was trained with other symbols of the task 'addition'"):
        load_model(tmp_path)


def test_a_model_without_a_core_has_no_depth(tmp_path, small_run):
    values = small_run(tmp_path)
    values["model"] |= {"core_layers": 0, "recurrence": {}}
    write_run(build(values), {1: None})
    assert load_model(tmp_path).trained_depth is None


def test_a_config_of_another_version_is_one_clear_error(tmp_path, small_run):
    write_run(build(small_run(tmp_path)), {1: None})
    checkpoint = tmp_path / "checkpoints" / "1" / "run" / "metadata"
    checkpoint.write_text(checkpoint.read_text().replace('"width"', '"breadth"', 1))
    with pytest.raises(UserError, match=r"does not fit this version .*model\.breadth"):
        load_model(tmp_path)


def test_a_huginn_folder_is_read(huginn_folder, caplog):
    folder, _, params = huginn_folder
    with caplog.at_level("WARNING", logger="absl"):
        loaded = load_model(folder)
    assert_same(loaded.params, params)
    assert loaded.trained_depth == 3
    assert loaded.tokenizer is None
    assert loaded.description == f"Huginn model {folder}"
    assert "prompts must be token ids" in caplog.text
    leaves = jax.tree.leaves(loaded.params)
    assert all(leaf.devices() == {jax.local_devices()[0]} for leaf in leaves)
    with pytest.raises(UserError, match="a Huginn folder has one set of weights"):
        load_model(folder, step="best")


def test_huginn_weights_may_stay_as_short_as_they_are(huginn_folder, tmp_path):
    _, config, params = huginn_folder
    save_folder(tmp_path / "short", Huginn(), config, params, dtype="bfloat16")
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), params)
    stored = load_model(tmp_path / "short", param_dtype="stored").params
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(stored, wanted)
    converted = load_model(tmp_path / "short").params
    assert {leaf.dtype for leaf in jax.tree.leaves(converted)} == {jnp.dtype(jnp.float32)}
    assert_same(converted, jax.tree.map(lambda leaf: leaf.astype(np.float32), wanted))


def test_tokenizers_of_huginn_folders(huginn_folder, sentencepiece_run, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "model"
    shutil.copytree(huginn_folder[0], folder)
    shutil.copy(sentencepiece_run[0] / "tokenizer.model", folder)
    assert isinstance(load_model(folder).tokenizer, SentencePieceTokenizer)
    words = {"<s>": 0, "</s>": 1, "a": 2, "<turn>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": 0, "eos_token_id": [1, 3]}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    loaded = load_model(folder)
    assert loaded.tokenizer.bos_id == 0 and loaded.tokenizer.end_ids == (1, 3)
    words = {f"word{number}": number for number in range(400)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="the tokenizer has 400 ids, but the model only 320"):
        load_model(folder)


def test_a_folder_that_is_neither_says_what_was_looked_for(tmp_path, small_run):
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(
        UserError, match=r"neither the workdir .* nor a folder of a known .* has: nothing\."
    ):
        load_model(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"It has: notes\.txt\."):
        load_model(tmp_path)
    save_config(build(small_run(tmp_path)), tmp_path / "config.json")
    with pytest.raises(UserError, match="this run has no checkpoints/ yet"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no complete checkpoint"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        load_model(tmp_path)


def test_the_home_folder_may_be_abbreviated(huginn_folder, monkeypatch):
    monkeypatch.setitem(os.environ, "HOME", str(huginn_folder[0].parent))
    assert load_model("~/model").trained_depth == 3


def test_a_model_may_be_laid_over_devices(sentencepiece_run):
    """With what one device says, and the weights divided."""
    alone = Model(load_model(sentencepiece_run[0]))
    mesh = ModelMeshConfig(data=2, tensor=2)
    lm = Model(load_model(sentencepiece_run[0], mesh=mesh))
    prompts = ["The ", "If it"]
    options = {"strategy": "greedy", "max_new_tokens": 6, "depth": 2}
    wanted = [found.token_ids for found in alone.generate(prompts, **options)]
    assert [found.token_ids for found in lm.generate(prompts, **options)] == wanted
    # One input does not divide, and is computed by all.
    wanted = alone.generate(prompts[1], **options)
    assert lm.generate(prompts[1], **options).token_ids == wanted.token_ids
    logits = alone(prompts, depth=2).logits
    np.testing.assert_allclose(lm(prompts, depth=2).logits, logits, atol=1e-5)
    halves = [
        leaf
        for leaf in jax.tree.leaves(lm.params)
        if leaf.addressable_shards[0].data.size * 2 == leaf.size
    ]
    assert len(halves) > 5 and all(len(leaf.sharding.device_set) == 4 for leaf in halves)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 5, "tensor": 3}, "data=5 x tensor=3 needs 15 devices, and there are 8 devices"),
        ({"tensor": 8}, "is not divisible by the 8 devices of mesh axis tensor"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sentencepiece_run, mesh, message):
    with pytest.raises(ConfigError, match=message):
        load_model(sentencepiece_run[0], mesh=ModelMeshConfig(**mesh))
