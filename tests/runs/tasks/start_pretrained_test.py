"""A run starts from another model: its parameters, its tokenizer, and what is refused."""

import json

import jax
import numpy as np
import optax
import pytest
from absl import logging
from written_run import write_run

from megatransformer_jax.checkpoints.compatibility import CheckpointMismatch
from megatransformer_jax.checkpoints.folders import save_folder
from megatransformer_jax.checkpoints.huginn import Huginn
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.build import build, merge, save_config
from megatransformer_jax.config.fine_tuning import FineTuningConfig, LoraConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.models.adaptation import kept_params, model_params
from megatransformer_jax.models.megatransformer import init_params
from megatransformer_jax.runs.build import abstract_train_state, build_sharded_model
from megatransformer_jax.runs.load import load_model
from megatransformer_jax.runs.tasks.start import _adopt, fresh_state, pretrained_state, run_info
from megatransformer_jax.runs.tokenizers import inherited_tokenizer, start_tokenizer
from megatransformer_jax.training.trainable import split_params

OPTIMIZER = optax.sgd(1.0)
HUGINN = {
    "scale_embeddings": True,
    "norm": {"placement": "sandwich"},
    "positions": {"rotary_convention": "interleaved"},
}


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


@pytest.fixture(scope="module")
def source(tmp_path_factory, small_run):
    """A run on bytes with two checkpoints, of which the older is the better."""
    folder = tmp_path_factory.mktemp("source") / "run"
    return folder, write_run(build(small_run(folder)), {4: 1.0, 8: 2.0})


@pytest.fixture(scope="module")
def sentencepiece_source(tmp_path_factory, small_run):
    """A run with a tokenizer that it trained."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "data.jsonl"
    text.write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 50)
    changes = {
        "model": {"vocab_size": 320},
        "data": {
            "source": "jsonl", "files": [str(text)], "validation_fraction": 0.1,
            "tokenizer": {"kind": "sentencepiece", "vocab_size": 310},
        },
    }  # fmt: skip
    values = merge(small_run(folder / "run"), changes)
    config = build(values)
    (folder / "run").mkdir()
    save_config(config, folder / "run" / "config.json")
    (folder / "run" / "checkpoints").mkdir()
    start_tokenizer(config, folder / "run")
    return folder / "run"


def start(config, workdir):
    tokenizer = start_tokenizer(config, workdir)
    model, sharder = build_sharded_model(config)
    abstract = abstract_train_state(model, OPTIMIZER, sharder, config.fine_tuning)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return pretrained_state(config, model, OPTIMIZER, sharder, shardings, tokenizer)


def from_source(small_run, workdir, source, changes=None, **options):
    options = {"init_from": str(source), **options}
    values = small_run(workdir, {"fine_tuning": options, "mesh": {"data": 4, "fsdp": 2}})
    return build(merge(values, changes or {}))


def test_parameters_come_from_the_checkpoint_that_is_named(source, tmp_path, small_run):
    folder, params = source
    state = start(from_source(small_run, tmp_path, folder, init_step="best"), tmp_path)
    assert_same(state.params, params[4])
    assert int(state.step) == 0
    qkv = state.params["core"]["layers"]["layer_0"]["attention"]["qkv"]
    assert qkv.addressable_shards[0].data.shape[0] == qkv.shape[0] // 2


def test_parameters_come_from_a_huginn_folder(tmp_path, small_run):
    changes = {"model": HUGINN}
    config = from_source(small_run, tmp_path, tmp_path / "huginn", changes)
    model, _ = build_sharded_model(config)
    params = jax.device_get(init_params(model, jax.random.key(3)))
    save_folder(tmp_path / "huginn", Huginn(), config.model, params)
    state = start(config, tmp_path)
    assert_same(state.params, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"width": 32}}, r"another model .*\n  model\.width: saved 16, now 32"),
        ({"model": {"max_length": 64, "norm": {"eps": 1e-5}}}, r"run:\n  model\.norm\.eps: .*\nG"),
        ({"model": {"recurrence": {"adapter": "sum"}}}, r"model\.recurrence\.adapter: saved"),
    ],
)
def test_another_architecture_is_refused(source, tmp_path, small_run, changes, message):
    """max_length alone is free with rotary positions."""
    with pytest.raises(CheckpointMismatch, match=r"(?s)fine_tuning\.init_from: .*" + message):
        start(from_source(small_run, tmp_path, source[0], changes), tmp_path)


def test_a_plain_model_is_no_recurrent_one_and_the_reverse(source, tmp_path, small_run):
    with pytest.raises(ConfigError, match=r"fine_tuning\.retrofit: True needs a plain model"):
        start(from_source(small_run, tmp_path, source[0], retrofit=True), tmp_path)
    values = small_run(
        tmp_path, {"fine_tuning": {"init_from": str(source[0])}, "model": {"core_layers": 0}}
    )
    values["model"]["recurrence"] = {}
    with pytest.raises(CheckpointMismatch, match=r"model\.core_layers: saved 1, now 0"):
        start(build(values), tmp_path)


def test_another_vocabulary_is_refused(source, sentencepiece_source, tmp_path, small_run):
    """A run on bytes and one with pieces, in both directions."""
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.kind: .* trained on bytes"):
        config = {"data": {"tokenizer": {"kind": "sentencepiece"}}}
        start(from_source(small_run, tmp_path, source[0], config), tmp_path)
    model = {"model": {"vocab_size": 320}}
    files = {"data": {"tokenizer": {"kind": "sentencepiece"}}}
    files["data"]["tokenizer"]["model_file"] = str(sentencepiece_source / "tokenizer.model")
    with pytest.raises(CheckpointMismatch, match=r"(?s)trained with another vocabulary"):
        start(from_source(small_run, tmp_path, source[0], merge(model, files)), tmp_path)


def test_the_tokenizer_is_copied_once(sentencepiece_source, tmp_path, small_run):
    folder = sentencepiece_source
    changes = {"model": {"vocab_size": 320}, "data": {"tokenizer": {"kind": "sentencepiece"}}}
    config = from_source(small_run, tmp_path, folder, changes)
    tokenizer = start_tokenizer(config, tmp_path)
    assert tokenizer.vocab_size == 310
    original = (folder / "tokenizer.model").read_bytes()
    assert (tmp_path / "tokenizer.model").read_bytes() == original
    # Later starts do not need the source, and the options of the source may be repeated.
    absent = from_source(small_run, tmp_path, "absent", changes)
    assert start_tokenizer(absent, tmp_path).digest() == tokenizer.digest()
    repeated = merge(changes, {"data": {"tokenizer": {"vocab_size": 310}}})
    again = inherited_tokenizer(
        from_source(small_run, tmp_path / "b", folder, repeated), tmp_path / "b"
    )
    assert again.digest() == tokenizer.digest()
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size: 315 would be ignored"):
        other = merge(changes, {"data": {"tokenizer": {"vocab_size": 315}}})
        inherited_tokenizer(from_source(small_run, tmp_path / "c", folder, other), tmp_path / "c")


def test_a_hugging_face_tokenizer_is_inherited(tmp_path, small_run):
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<s>", "</s>", *(chr(97 + index) for index in range(20))]
    model = tokenizers.models.WordLevel({piece: index for index, piece in enumerate(pieces)}, "a")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder, workdir = tmp_path / "huginn", tmp_path / "run"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": 0, "eos_token_id": 1, "model_type": "huginn_raven", "architectures": []}
    (folder / "config.json").write_text(json.dumps(ids))
    changes = {"model": {"vocab_size": 64}, "data": {"tokenizer": {"kind": "sentencepiece"}}}
    config = from_source(small_run, workdir, folder, changes)
    ours = inherited_tokenizer(config, workdir)
    assert ours.encode("b d") == [3, 5]
    # The run's own model reads text with it as well.
    write_run(config, {2: None})
    loaded = load_model(workdir)
    assert loaded.tokenizer.digest() == ours.digest()


def test_what_only_the_new_model_has_is_fresh():
    fresh = {"core": {"kernel": 0}, "exit_gate": {"weight": 1}}
    assert _adopt(fresh, {"core": {"kernel": 2}}) == {
        "core": {"kernel": 2},
        "exit_gate": {"weight": 1},
    }
    both = {"core": {"kernel": 2}, "exit_gate": {"weight": 3}}
    assert _adopt(fresh, both) == both
    looped = {"core": {"kernel": 0, "loop_embedding": 4}}
    assert _adopt(looped, {"core": {"kernel": 2}}) == {"core": {"kernel": 2, "loop_embedding": 4}}


def test_a_model_without_parameters_of_iterations_can_be_given_some(source, tmp_path, small_run):
    own = {"loop_scale": True, "loop_lora_rank": 2, "loop_iterations": 2}
    options = {"model": {"recurrence": own}}
    state = start(from_source(small_run, tmp_path, source[0], options), tmp_path)
    block = state.params["core"]["layers"]["layer_0"]
    np.testing.assert_array_equal(block["mlp_loop_scale"], np.ones(2))
    old = source[1][8]["core"]["layers"]["layer_0"]["mlp"]
    assert_same(block["mlp"]["up"], old["up"])
    assert np.all(np.asarray(block["mlp"]["up_loop_b"]) == 0)


def test_a_run_with_lora_is_read_and_exported_merged(source, tmp_path, small_run):
    """What generation, evaluation, export and further fine-tuning get."""
    options = {"init_from": str(source[0]), "lora": {"rank": 2, "alpha": 4.0}}
    config = build(small_run(tmp_path / "run", {"model": HUGINN, "fine_tuning": options}))
    model, _ = build_sharded_model(config)
    (tmp_path / "run").mkdir()
    tokenizer = start_tokenizer(config, tmp_path / "run")
    params = init_params(model, jax.random.key(0))
    kept = kept_params(model, config.fine_tuning, params, jax.random.key(1))
    kept["lora"] = jax.tree.map(lambda leaf: leaf + 0.1, kept["lora"])
    checkpoints = CheckpointManager(tmp_path / "run" / "checkpoints", config.checkpoint)
    checkpoints.save(2, {"params": kept}, {}, run_info(config, tokenizer.digest()))
    checkpoints.close()
    loaded = load_model(tmp_path / "run")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        loaded.params,
        model_params(kept, config.fine_tuning),
    )
    up, base = (tree["coda"]["layer_0"]["mlp"]["up"] for tree in (loaded.params, params))
    assert np.max(np.abs(up - base)) > 0.01
    command("export", [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"])
    assert_same(load_model(tmp_path / "out").params, loaded.params)


def test_freezing_without_a_source_is_warned_of(tmp_path, small_run, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lines.append)
    config = build(small_run(tmp_path, {"fine_tuning": {"train_only": ["^core/"]}}))
    tokenizer = start_tokenizer(config, tmp_path)
    model, sharder = build_sharded_model(config)
    fresh_state(config, model, OPTIMIZER, sharder, tokenizer, None)
    assert any("fine_tuning.init_from is None" in line for line in lines)


def test_a_frozen_gate_that_the_source_lacks_is_refused(source, tmp_path, small_run):
    changes = {"model": {"exit_gate": {"enabled": True}}}
    config = from_source(small_run, tmp_path, source[0], changes, train_only=["^core/"])
    with pytest.raises(ConfigError, match=r"train_only: exit_gate/weight .*the gate starts fresh"):
        start(config, tmp_path)


def test_lora_trains_a_gate_that_the_source_lacks(source, tmp_path, small_run):
    changes = {"model": {"exit_gate": {"enabled": True}}}
    lora = {"rank": 1, "targets": ["core/.*mlp/down$"]}
    state = start(from_source(small_run, tmp_path, source[0], changes, lora=lora), tmp_path)
    trained, _ = split_params(state.params, FineTuningConfig(init_from="it", lora=LoraConfig(1)))
    sizes = jax.tree.map(jax.numpy.size, trained)
    assert sizes["base"]["exit_gate"] == {"bias": 1, "norm": {"scale": 16}, "weight": 16}
    assert sum(jax.tree.leaves(sizes["lora"])) == 32


def test_the_log_says_where_layers_go(tmp_path, small_run, monkeypatch):
    lines = []
    monkeypatch.setattr(
        logging, "info", lambda text, *values: lines.append(text % values if values else "")
    )
    plain = {"model": {"core_layers": 0, "prelude_layers": 3, "coda_layers": 1}}
    values = merge(small_run(tmp_path / "plain"), plain)
    values["model"]["recurrence"] = {}
    params = write_run(build(values), {2: None})[2]
    config = from_source(small_run, tmp_path, tmp_path / "plain", retrofit=True, core_start=1)
    state = start(config, tmp_path)
    assert any("core of 1, coda of 3; dropped: 2" in line for line in lines)
    assert_same(state.params["core"]["layers"]["layer_0"], params["prelude"]["layer_1"])
    assert isinstance(load_model(tmp_path / "plain").tokenizer, BytesTokenizer)
