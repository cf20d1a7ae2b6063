"""lm-eval's own command line with a small run as its model."""

import functools
import json
import logging
import os
import socket
import types

import lm_eval.evaluator
import lm_eval.utils
import pytest
from lm_eval.tasks import TaskManager
from written_run import write_run

from megatransformer_jax.cli import lm_eval as lm_eval_command
from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.build import build
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.pipeline import build_pipeline
from megatransformer_jax.evaluation.log_likelihood import Continuation, LogLikelihoodScorer
from megatransformer_jax.runs.load import load_model

TASK = """
task: local_likelihood
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
"""
RECORD = {"prompt": "The", "answer": " end"}


def no_network(self, address):
    raise AssertionError(f"a connection to {address} was tried")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, small_run):
    folder = tmp_path_factory.mktemp("run") / "run"
    write_run(build(small_run(folder)), {4: 1.0, 8: 2.0})
    return folder


@pytest.fixture
def run(monkeypatch):
    """Runs the command; what it does to the environment ends with the test."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return lambda *words: command("lm-eval", list(map(str, words)))


def test_a_task_runs_at_the_depth_that_is_given(run, workdir, tmp_path, capfd, monkeypatch):
    # Reading lm-eval's thousands of tasks takes eight seconds.
    make = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", make)
    # A report on the machine, for which torch is imported, as it is for torch's seed.
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    (tmp_path / "texts.jsonl").write_text(json.dumps(RECORD) + "\n")
    (tmp_path / "task.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    run(
        *("run", "--model", "megatransformer", "--tasks", "local_likelihood", "--batch_size", 2),
        *("--model_args", f"path={workdir},step=4,depth=3", "--include_path", tmp_path),
        *("--output_path", tmp_path / "results", "--log_samples", "--seed", "0,0,None,0"),
    )
    assert "local_likelihood" in capfd.readouterr().out
    (path,) = (tmp_path / "results").rglob("samples_*.jsonl")
    ((response,),) = json.loads(path.read_text())["resps"]
    loaded = load_model(workdir, step=4)
    scorer = LogLikelihoodScorer(
        loaded.model,
        loaded.params,
        depth=3,
        batch_size=2,
        max_length=loaded.config.max_length,
    )
    encode = loaded.tokenizer.encode
    (wanted,) = scorer.score(
        [Continuation([loaded.tokenizer.bos_id, *encode("The")], encode(" end"))]
    )
    assert float(response[0]) == pytest.approx(wanted.log_prob, abs=1e-4)
    assert os.environ["HF_DATASETS_OFFLINE"] == "1"


def test_arguments_become_the_model(workdir):
    make = lm_eval_command.LoadedMegaTransformerLM.create_from_arg_string
    lm = make(f"path={workdir},max_length=20,add_bos_token=False", {"batch_size": "4"})
    assert (lm.batch_size, lm.max_length, lm.tok_encode("a")) == (4, 20, [100])
    # The trained mean, of the latest checkpoint.
    assert lm._depth == 2
    # As long as the rows in training.
    assert make(f"path={workdir}").max_length == 16
    for text, problem in (
        ("depth=0", "depth: 0 is not allowed"),
        ("max_length=100000", "max_length=100000 exceeds"),
        ("step=7", "no such checkpoint"),
        ("weights=raw", "has one set of weights"),
    ):
        with pytest.raises(UserError, match=problem):
            make(f"path={workdir},{text}")


def test_our_names_become_those_of_lm_eval():
    words = ["--model=runs/a", "--depth", "16", "--tasks=x", "--output=out", "--limit", "3"]
    parsed = lm_eval_command.parse(words)
    assert (parsed.model, parsed.model_args) == ("megatransformer", {"path": "runs/a", "depth": 16})
    assert (parsed.tasks, parsed.output_path, parsed.limit) == (["x"], "out", 3)
    with pytest.raises(UserError, match="--depth: 'deep' is not a whole number"):
        lm_eval_command.parse(["--model=runs/a", "--depth=deep"])
    with pytest.raises(UserError, match="--depth needs a value"):
        lm_eval_command.parse(["--model=runs/a", "--depth"])


@pytest.mark.parametrize(
    ("given", "of_lm_eval", "problem"),
    [
        ({}, {}, "the model is missing; give --model=runs/recurrent"),
        ({"path": "a", "dpeth": 3}, {}, "dpeth=3 is not known; known: path, step"),
        ({"path": "a"}, {"device": "cuda"}, "--device=cuda: JAX chooses"),
        ({"path": "a"}, {"batch_size": "auto"}, "batch_size=auto: must be a number"),
        ({"path": "a"}, {"max_batch_size": 4}, "--max_batch_size=4"),
        ({"path": "a", "precision": "half"}, {}, "precision: 'half' is not allowed"),
    ],
)
def test_wrong_arguments(given, of_lm_eval, problem):
    with pytest.raises(UserError, match=problem):
        lm_eval_command.parse_arguments(given, of_lm_eval)


def test_bad_input_is_one_line(run, capfd):
    with pytest.raises(SystemExit) as caught:
        run("run", "--model", "megatransformer", "--model_args", "dpeth=3", "--tasks", "x")
    assert caught.value.code == 2
    assert capfd.readouterr().err.startswith("error: --model_args: dpeth=3 is not known")


def test_the_path_is_checked_before_tasks_are_loaded(run, capfd, monkeypatch):
    monkeypatch.setattr(TaskManager, "__init__", lambda *args, **kwargs: pytest.fail("loaded"))
    arguments = ("--model_args", "path=/nope,depth=2", "--tasks", "x")
    with pytest.raises(SystemExit) as caught:
        run("run", "--model", "megatransformer", *arguments)
    assert caught.value.code == 2
    assert capfd.readouterr().err.startswith("error: --model_args: path=/nope: no such folder")


MISSING_DATA = """
task: no_data
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/absent.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
"""


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("nope", "error: lm-eval: Tasks not found: nope. --debug prints the traceback."),
        ("no_data", "Nothing is downloaded without --online; --debug prints the traceback."),
    ],
)
def test_what_lm_eval_cannot_use_is_one_line(
    task, problem, run, workdir, tmp_path, capfd, monkeypatch
):
    make = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", make)
    # Its handler would write to the stderr of the test before.
    monkeypatch.setattr(logging.getLogger("lm_eval"), "handlers", [])
    monkeypatch.setattr(lm_eval.utils, "setup_logging", lambda: None)
    (tmp_path / "task.yaml").write_text(MISSING_DATA.replace("FOLDER", str(tmp_path)))
    words = (
        *("run", "--model", "megatransformer", "--model_args", f"path={workdir}"),
        *("--tasks", task, "--include_path", tmp_path, "--seed", "0,0,None,0"),
    )
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert problem in errors.splitlines()[-1]
    with pytest.raises((ValueError, FileNotFoundError)):
        run("--debug", *words)


def test_an_error_of_our_own_code_keeps_its_traceback(run, monkeypatch):
    parsed = types.SimpleNamespace(
        func=lambda parsed: build_pipeline(DataConfig(), None, split="nope")
    )
    monkeypatch.setattr(lm_eval_command, "parse", lambda words: parsed)
    with pytest.raises(ValueError, match="no split 'nope'"):
        run("run")


def test_help_has_every_argument(run, capfd):
    run("--help")
    text = capfd.readouterr().out
    assert text.startswith("Usage: megatransformer lm-eval")
    for name in ("model", "depth", "add_bos_token", "output"):
        assert f"\n  --{name} (" in text


def test_online_leaves_the_environment_alone(run, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    run("--online", "--help")
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    run("--help")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
