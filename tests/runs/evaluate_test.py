"""experiments.evaluate on a small run's checkpoint, from the command line to the files."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest
import sacrebleu
from written_run import write_run

from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.build import build
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.scoring import ScoringConfig
from megatransformer_jax.data.pipeline import validation_batches
from megatransformer_jax.data.sources import build_source
from megatransformer_jax.evaluation.validation import Scores, ValidationSet, make_eval_step
from megatransformer_jax.runs import evaluate as evaluate_module
from megatransformer_jax.runs.evaluate import check_votes
from megatransformer_jax.runs.load import load_model

DEPTHS = (1, 3)


@pytest.fixture(scope="module")
def config(tmp_path_factory, small_run):
    folder = tmp_path_factory.mktemp("run") / "run"
    # One shape for all tests, and little text.
    config = build(small_run(folder, {"evaluation": {"final_depths": DEPTHS}}))
    write_run(config, {4: 1.0, 8: 2.0})
    return config


@pytest.fixture
def run(config, tmp_path, capfd):
    """Runs the command; returns what it wrote to stdout and the folder of its files."""

    def run(*words):
        command("evaluate", [f"--model={config.workdir}", f"--output={tmp_path}", *words])
        return capfd.readouterr().out, tmp_path

    return run


def fails(run, capfd, *words):
    """The last line of an error."""
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    return capfd.readouterr().err.splitlines()[-1]


def rows_of(folder, name="depth_table.json"):
    return json.loads((folder / name).read_text())["rows"]


def test_scores_are_those_of_validation_in_training(run, config):
    out, folder = run("--step=best", "--num_batches=2")
    rows = rows_of(folder)
    assert [row["depth"] for row in rows] == list(DEPTHS)
    loaded = load_model(config.workdir, step="best")
    batches = validation_batches(config.data, loaded.tokenizer, num_batches=2)
    key = jax.random.fold_in(jax.random.key(config.train.seed), 2**32 - 1)
    validation = ValidationSet(batches, jax.jit(make_eval_step(loaded.model, key)))
    for row, depth in zip(rows, DEPTHS, strict=True):
        wanted = validation.score(loaded.params, depth)
        assert row["loss"] == pytest.approx(wanted.loss, rel=1e-5)
        assert row["accuracy"] == pytest.approx(wanted.accuracy)
        assert row["tokens"] == wanted.tokens
        assert f"{wanted.loss:.4f}" in out
        # The tokenizer has a token per byte; end tokens are in the loss, but no text.
        num_ends = sum(int((np.asarray(batch.targets) == 2).sum()) for batch in batches)
        num_bytes = wanted.tokens - num_ends
        bits = wanted.loss * wanted.tokens / math.log(2) / num_bytes
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-3)
    assert (folder / "depth_table.png").is_file()
    assert "exact answers" not in out


def test_files_are_scored(run, tmp_path, config):
    documents = build_source(config.data, "validation")
    text = "\n\n".join(documents[index] for index in range(2))[:300]
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": text}) + "\n")
    run(f"--files={tmp_path}/b.jsonl", "--text_field=body", "--depths=1", "--seed=7")
    (row,) = rows_of(tmp_path)
    assert row["depth"] == 1
    assert row["tokens"] == len(text.encode()) + 1


def test_wrong_use(run, capfd, tmp_path):
    assert "no such file" in fails(run, capfd, "--files=absent.txt")
    error = fails(run, capfd, "--sequence_length=100000")
    assert error.startswith("error: --sequence_length: 100000 exceeds")
    error = fails(run, capfd, "--param_dtype=stored")
    assert error.startswith("error: --param_dtype: 'stored' is for checkpoints")
    assert "no such checkpoint" in fails(run, capfd, "--step=5")
    assert "has one set of weights" in fails(run, capfd, "--weights=raw")
    (tmp_path / "file").touch()
    error = fails(run, capfd, f"--output={tmp_path}/file", "--num_batches=1")
    assert error.startswith("error: --output: ")


def test_texts_are_generated_and_scored(run, tmp_path, capfd):
    """The scores are sacrebleu's; those of the file of texts are the same."""
    lines = [
        {"prompt": "If the statement", "reference": ["a", "b c"]},
        {"prompt": "The ", "reference": "end"},
    ]
    path = tmp_path / "references.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, folder = run(f"--references={path}", "--max_new_tokens=8", "--batch_size=2")
    found = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [record["depth"] for record in found] == [1, 1, 3, 3]
    assert [record["prompt"] for record in found[2:]] == [line["prompt"] for line in lines]
    texts = [record["text"] for record in found[2:]]
    assert all(texts) and texts != [record["text"] for record in found[:2]]
    rows = rows_of(folder, "text_scores.json")
    wanted = sacrebleu.corpus_chrf(texts, [["a", "end"], ["b c", None]]).score
    assert rows[1]["chrf"] == pytest.approx(wanted)
    assert f"{wanted:.2f}" in out
    assert (folder / "text_scores.png").is_file()
    # The same texts from the file, without a model.
    predictions = tmp_path / "texts.jsonl"
    predictions.write_text("".join(json.dumps(record) + "\n" for record in found[2:]))
    command("evaluate", [f"--references={path}", f"--predictions={predictions}"])
    assert f"{wanted:.2f}" in capfd.readouterr().out


def test_problems_have_exact_answers(tmp_path, small_run, capfd, monkeypatch):
    def score(loaded, batches, depths, key, progress, *, readout, votes):
        assert votes == 1
        tokens = sum(int(np.asarray(batch.loss_mask).sum()) for batch in batches)
        return [Scores(depth, 1.0, math.e, 0.5, 0.25, tokens) for depth in depths]

    # How batches are scored is tested above.
    monkeypatch.setattr(evaluate_module, "score_batches", score)
    data = {"source": "reasoning", "tokenizer": {"kind": "sentencepiece"}, "sequence_length": 64}
    values = small_run(tmp_path / "run", {"data": data, "model": {"vocab_size": 16}})
    values["evaluation"]["final_depths"] = [2]
    write_run(build(values), {4: 1.0})
    command("evaluate", [f"--from={tmp_path}/run", "--num_batches=1"])
    out = capfd.readouterr().out
    assert "exact answers" in out and "bits per byte" not in out
    (row,) = rows_of(tmp_path / "run" / "evaluation")
    assert row["exact_accuracy"] == 0.25
    assert row["depth"] == 2 and row["tokens"] > 0
    with pytest.raises(SystemExit):
        command("evaluate", [f"--model={tmp_path}/run", "--files=a.txt"])
    assert "symbols of a reasoning task" in capfd.readouterr().err


def test_votes_need_first_states_that_differ(config):
    def loaded(task, **recurrence):
        model = dataclasses.replace(
            config.model, recurrence=dataclasses.replace(config.model.recurrence, **recurrence)
        )
        return types.SimpleNamespace(task=task, config=model)

    votes = ScoringConfig(votes=4)
    check_votes(votes, loaded("reasoning", state_init="normal"))
    check_votes(ScoringConfig(), loaded("text", state_init="zero"))
    with pytest.raises(ConfigError, match="votes: 4 is for answers to problems"):
        check_votes(votes, loaded("text", state_init="normal"))
    with pytest.raises(ConfigError, match=r"votes: 4 needs first states that differ.*'zero'"):
        check_votes(votes, loaded("reasoning", state_init="zero"))
    plain = types.SimpleNamespace(task="reasoning", config=ModelConfig(core_layers=0))
    with pytest.raises(ConfigError, match="votes: 4 needs a recurrent core"):
        check_votes(votes, plain)
    with pytest.raises(ConfigError, match="votes"):
        ScoringConfig(votes=4, references="a.jsonl")
