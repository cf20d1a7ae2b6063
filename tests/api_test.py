"""The public face: its examples, training by hand, evaluation, and what cannot be used."""

import doctest
import importlib
import json
import pathlib
import pickle
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

import megatransformer_jax as mt
from megatransformer_jax.config.option import ConfigError

pytestmark = pytest.mark.smoke

STEPS = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run, trained through the API."""
    folder = tmp_path_factory.mktemp("api") / "run"
    config = mt.configure(
        "recurrent:tiny",
        train={"steps": STEPS},
        checkpoint={"every_steps": 10},
        samples={"every_steps": 0},
        evaluation={"final_depths": [1, 4], "num_batches": 1},
    )
    with mt.Trainer(config, workdir=folder) as trainer:
        assert trainer.run()
    return folder


@pytest.fixture(scope="module")
def lm(run: pathlib.Path) -> mt.Model:
    return mt.load(run)


def modules_with_examples() -> list[str]:
    """Modules whose docstrings have examples; those of extras are left to their own tests."""
    root = pathlib.Path(mt.__file__).parent
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if re.search(r"Examples:\n *>>> ", path.read_text())
    ]
    return [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in paths]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str, run: pathlib.Path, lm: mt.Model, tmp_path: pathlib.Path) -> None:
    names = {"mt": mt, "lm": lm, "run": run, "folder": tmp_path}
    result = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert result.failed == 0
    assert result.attempted >= 1


def test_the_public_names_have_examples() -> None:
    modules = {f"{mt.__name__}.{place}" for place in mt._PLACES}
    # What `configure` shows, and a tokenizer that needs an extra.
    without = {f"megatransformer_jax.{name}" for name in ("config.run", "config.model")}
    without.add("megatransformer_jax.data.hf_tokenizer")
    assert modules - without <= set(modules_with_examples())


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    assert len(mt.__all__) <= 24
    assert set(mt.__all__) < set(dir(mt))
    for name in mt.__all__:
        assert (getattr(mt, name).__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = mt.lod  # type: ignore[attr-defined]


def test_importing_loads_neither_jax_nor_numpy() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import megatransformer_jax as mt\n"
        "seconds = time.perf_counter() - start\n"
        "print(seconds, *(name in sys.modules for name in ('jax', 'numpy', 'rich')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.split()
    assert loaded == ["False"] * 3
    assert float(seconds) < 0.2


def test_steps_by_hand_are_those_of_the_run(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """And so is what follows a break: metrics to the bit, from another object."""
    config = mt.configure(str(run / "config.json"))
    trainer = mt.Trainer(config, workdir=tmp_path / "again")
    by_hand = [trainer.step() for _ in range(3)]
    assert trainer.step_number == 3
    trainer.save()
    del trainer  # As where the cell of a notebook is run again.
    trainer = mt.Trainer.resume(tmp_path / "again")
    assert trainer.step_number == 3
    by_hand.append(trainer.step())
    assert trainer.run() and trainer.step_number == STEPS
    rows = mt.read_metrics(run)
    assert mt.read_metrics(tmp_path / "again" / "metrics.jsonl") == rows
    for row, metrics in zip(rows, by_hand, strict=False):
        assert {name: row[name] for name in metrics} == metrics
    assert trainer.run()  # Nothing is left to do.
    with pytest.raises(mt.UserError, match=r"all 20 steps are done; raise train\.steps"):
        trainer.step()
    trainer.close()
    np.testing.assert_array_equal(
        mt.load(tmp_path / "again")("The end", depth=2).logits,
        mt.load(run)("The end", depth=2).logits,
    )


def test_a_model_of_a_trainer_outlives_the_next_step(tmp_path: pathlib.Path) -> None:
    values = {"train": {"steps": 12}, "samples": {"every_steps": 0}}
    with mt.Trainer(mt.configure("recurrent:tiny", **values), workdir=None) as trainer:
        before = trainer.model
        wanted = before("abc").logits
        trainer.step()
        np.testing.assert_array_equal(before("abc").logits, wanted)
        assert not np.array_equal(trainer.model("abc").logits, wanted)
        assert "step 1 of 12 steps" in repr(trainer) and "no workdir" in repr(trainer)
        with pytest.raises(mt.UserError, match="workdir=None, so it writes nothing"):
            trainer.save()
    assert list(tmp_path.iterdir()) == []


def test_batches_of_your_own(lm: mt.Model) -> None:
    config = mt.configure("recurrent:tiny", train={"steps": 12})
    tokens = np.tile(np.arange(1, 17, dtype=np.int32), (8, 1))
    batch = mt.Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_mask=np.ones(tokens.shape, np.float32),
        segment_ids=np.ones_like(tokens),
        positions=np.tile(np.arange(16, dtype=np.int32), (8, 1)),
    )
    with mt.Trainer(config, workdir=None) as trainer:
        assert trainer.step(batch)["tokens"] == 128
        for changed, problem in (
            ({"tokens": tokens + 600}, "batch.tokens holds 601; ids are whole numbers from 0"),
            ({"targets": tokens.astype(float)}, "batch.targets holds float64"),
            ({"loss_mask": np.ones(3)}, r"batch.loss_mask has the shape \(3,\)"),
            ({"loss_mask": -batch.loss_mask}, r"finite weights of at least 0, .* it has -1\.0 to"),
            ({"loss_mask": 0 * batch.loss_mask}, "and one above 0"),
            ({"positions": batch.positions - 1}, "batch.positions holds -1; it holds whole numb"),
            ({"segment_ids": 0.5 + batch.segment_ids}, "batch.segment_ids holds float"),
            ({"targets": [["a"]]}, "batch.targets must be an array of numbers"),
            ({"media": 3}, "batch.media is given, but the model reads text alone"),
        ):
            with pytest.raises(mt.UserError, match=problem):
                trainer.step(batch._replace(**changed))
        with pytest.raises(mt.UserError, match=r"a batch is an mt\.Batch, not a ndarray"):
            trainer.step(tokens)  # type: ignore[arg-type]
        with pytest.raises(mt.UserError, match=r"shape \(0, 16\); it must be \[rows, tokens\]"):
            trainer.step(mt.Batch(*(np.ones((0, 16), np.int32) for _ in range(5))))
        lists = mt.Batch(*(np.asarray(field).tolist() for field in batch[:5]))
        assert trainer.step(lists)["tokens"] == 128
        long = mt.Batch(*(np.ones((8, 300), np.int32) for _ in range(5)))
        with pytest.raises(mt.UserError, match="rows of 300 tokens, and the model reads at most"):
            trainer.step(long)


def test_evaluation_prints_itself_and_has_rows(lm: mt.Model, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    report = mt.evaluate(lm, files=str(tmp_path / "*.txt"), depths=(1, 2), batch_size=2)
    assert [row["depth"] for row in report.rows] == [1, 2]
    assert f"{report.rows[1]['loss']:.4f}" in str(report)
    assert "<table>" in report._repr_html_()
    assert len(report.figure().axes) == 2
    assert [path.name for path in report.write(tmp_path)] == ["depth_table.json", "depth_table.png"]
    assert json.loads((tmp_path / "depth_table.json").read_text())["rows"] == report.rows
    one = mt.evaluate(lm, depths=2, num_batches=1)
    assert [row["depth"] for row in one.rows] == [2]


def test_generated_texts_are_evaluated(lm: mt.Model, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("rouge_score", reason="of the extra eval")
    lines = [{"prompt": "The", "reference": "end"}, {"prompt": "If", "reference": ["a", "b"]}]
    path = tmp_path / "references.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = mt.evaluate(lm, references=str(path), depths=(1,), max_new_tokens=3)
    assert report.rows[0].keys() >= {"depth", "bleu", "rouge_l", "exact_match"}
    with pytest.raises(mt.UserError, match="max_new_tokens: would be ignored, as no text"):
        mt.evaluate(lm, max_new_tokens=3)


def test_new_models_have_the_options_that_are_given() -> None:
    tokenizer = mt.BytesTokenizer()
    model = mt.create("tiny", tokenizer=tokenizer, core_layers=2, recurrence={"mean_steps": 3})
    assert (model.config.core_layers, model.trained_depth) == (2, 3)
    assert model.config.vocab_size == tokenizer.vocab_size
    again = mt.create(model.config, tokenizer=tokenizer, seed=0)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    other = mt.create(model.config, seed=1)
    assert not np.array_equal(other([[1, 2]]).logits, model([[1, 2]]).logits)
    assert other.generate([1, 2], max_new_tokens=2).text == ""


def test_costs_of_presets_models_and_runs(lm: mt.Model) -> None:
    rows = mt.inspect("huginn_3_5b", evaluation={"final_depths": [4, 32]}).rows
    assert rows[1]["forward_flops"] > 4 * rows[0]["forward_flops"]
    ours = mt.inspect(lm)
    assert [row["depth"] for row in ours.rows] == [1, 4]
    assert f"{lm.num_parameters:,}" in str(ours)
    assert mt.inspect(mt.configure("tiny")).rows
    with pytest.raises(mt.UserError, match="options go with the name of an experiment"):
        mt.inspect(lm, train={"steps": 3})


def test_configurations_come_from_names_files_and_paths(
    run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = mt.configure(
        "tiny", **{"train.steps": 70, "data": {"files": "a.txt"}, "data.source": "text"}
    )
    assert (config.preset, config.train.steps, config.data.files) == ("tiny", 70, ("a.txt",))
    assert mt.configure(str(run / "config.json")).train.steps == STEPS
    assert mt.configure("reasoning:tiny,diagonal").model.recurrence.adapter == "diagonal"


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: mt.load("absent"), r"absent: no such folder\. Name the workdir of a run"),
        (lambda: mt.configure("recurent"), "'recurent' is not an experiment; did you mean 'recurr"),
        (lambda: mt.configure("tiny", trian={}), "trian: no such option; did you mean 'train'"),
        (
            lambda: mt.configure("tiny", train={"step": 3}),
            r"train\.step: no such option; did you mean 'steps'",
        ),
        (
            lambda: mt.configure("tiny", train={"steps": 0}),
            r"train\.steps: 0 is not allowed; it must be at least 1",
        ),
        (lambda: mt.configure("tiny", train=3), r"train: 3 is not a section"),
        (lambda: mt.configure(), "config: no experiment given; name one"),
        (lambda: mt.configure(5), "experiment: 5 is neither a name nor a file"),  # type: ignore
        (
            lambda: mt.configure("tiny", train={"steps": 3}, **{"train.steps": 4}),
            r"train\.steps: is given twice",
        ),
        (lambda: mt.create(5), "neither the name of a preset nor a ModelConfig"),  # type: ignore
        (lambda: mt.create("tiny", tokenizer="bytes"), "tokenizer: 'bytes' is not a tokenizer"),  # type: ignore
        (lambda: mt.create("tiny", precision="fp16"), "precision: 'fp16' is unknown"),
        (lambda: mt.create("tiny", seed=-1), "seed: -1 is not allowed; it must be 0 to"),
        (
            lambda: mt.evaluate("runs/x"),
            r"'runs/x' is not an mt\.Model; read a folder with mt\.load",
        ),  # type: ignore
        (lambda: mt.inspect(None), "None is neither a RunConfig"),  # type: ignore
        (lambda: mt.load(None), "folder: None is not a path"),  # type: ignore
        (lambda: mt.load(__file__), "is a file. Name the workdir of a run"),
        (lambda: mt.Trainer(mt.configure("tiny"), workdir=5), "workdir: 5 is not a path"),  # type: ignore
        (lambda: mt.inspect("tiny").figure(), "this report has no plot"),
        (lambda: mt.create("tinny"), "preset: 'tinny' is unknown; did you mean 'tiny'"),
        (lambda: mt.create("tiny", core_layer=1), r"core_layer: .*did you mean 'core_layers'"),
        (
            lambda: mt.create("tiny", tokenizer=mt.BytesTokenizer(), vocab_size=100),
            "vocab_size: 100 is less than the 259 ids",
        ),
        (lambda: mt.Trainer("tiny"), "a Trainer takes a RunConfig"),  # type: ignore[arg-type]
        (lambda: mt.Trainer.resume("absent"), r"absent/config\.json does not exist"),
        (lambda: mt.read_metrics("absent"), "absent does not exist; name the folder of a run"),
        (lambda: mt.GenerationConfig.of(dpeth=3), "dpeth: no such option; did you mean 'depth'"),
        (
            lambda: mt.GenerationConfig.of(temperature=-1),
            r"sampling\.temperature: -1\.0 is not allowed",
        ),
    ],
)
def test_what_cannot_be_used_is_a_user_error(call: Any, problem: str) -> None:
    with pytest.raises(mt.UserError, match=problem):
        call()


def test_closing_saves_and_another_working_directory_changes_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    config = mt.configure("recurrent:tiny", train={"steps": 12})
    with mt.Trainer(config, workdir="run") as trainer:
        monkeypatch.chdir(tmp_path / "elsewhere")
        trainer.step()
    assert trainer.step_number == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    with pytest.raises(ZeroDivisionError), mt.Trainer.resume(tmp_path / "run") as trainer:
        trainer.step()
        raise ZeroDivisionError
    # What an error interrupted is not saved.
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_closed_trainer_without_a_workdir_is_gone() -> None:
    trainer = mt.Trainer(mt.configure("recurrent:tiny", train={"steps": 12}), workdir=None)
    trainer.step()
    assert "run without a workdir, step 1" in repr(trainer.model)
    trainer.close()
    assert trainer.step_number == 1
    with pytest.raises(mt.UserError, match=r"with workdir=None nothing of it was kept; read \.mod"):
        _ = trainer.model


def test_errors_and_names_for_people() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("train.steps", "0 is not allowed")))
    assert (error.path, str(error)) == ("train.steps", "train.steps: 0 is not allowed")
    with pytest.raises(AttributeError, match="did you mean 'load'"):
        mt.laod  # noqa: B018
    assert mt.__version__ and "importlib" not in dir(mt) and "load" in dir(mt)
    assert mt.inspect(mt.create("tiny", max_length=64)).rows


def test_a_trainer_refuses_what_its_workdir_cannot_go_on_with(run: pathlib.Path) -> None:
    with pytest.raises(mt.UserError, match=r"model\.width"):
        mt.Trainer.resume(run, model={"width": 32}).step()
    # The workdir is free again.
    mt.Trainer.resume(run).close()
    with mt.Trainer.resume(run) as trainer:
        assert trainer.step_number == STEPS
        with pytest.raises(mt.UserError, match="a run is writing to this workdir"):
            mt.Trainer.resume(run).step()


def test_vocoders_have_no_language_model() -> None:
    config = mt.configure("vocoder:tiny")
    with pytest.raises(mt.UserError, match="'vocoder': this command needs a transformer"):
        _ = mt.Trainer(config, workdir=None).model
