"""Commands and examples of the documentation do what they say, at the smallest sizes.

A training command is carried out in a tutorial where a later step reads its run. Any other one of a
tutorial is set up: `inspect` builds the model and traces the training step, but compiles nothing.
Those of guides are read and checked in `documented_names_test.py`, and so are `inspect` and
what reads a run that no tutorial makes. `pytest tests/docs/pages_run_test.py --train-all` carries
out all of them, which takes about 15 minutes; do so before a release.
"""

import io
import pathlib
import re
import sys
from typing import Any

import pytest
from markdown_pages import pages, steps
from page_runs import prepare, smallest

from megatransformer_jax.cli.commands import find_command
from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.cli.flags import parse

pytestmark = pytest.mark.slow

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
# In this order, as some read what others have made.
TUTORIALS = [
    "docs/README.md",
    "docs/tutorials/depth.md",
    "docs/tutorials/own_text.md",
    "docs/tutorials/reasoning.md",
    "docs/tutorials/watch_thinking.md",
    "docs/commands.md",
    "docs/tutorials/fine_tune.md",
    "docs/tutorials/media.md",
    "docs/tutorials/pods.md",
    "docs/questions.md",
]
GUIDES = sorted({str(path.relative_to(REPOSITORY)) for path in pages(REPOSITORY)} - {*TUTORIALS})
# What is not followed here, and why.
COMMANDS = {
    "compile": "needs libtpu and a process of its own; tests/runs/compile_test.py has both",
    "lm-eval": "reading lm-eval's thousands of tasks takes long; tests/cli/lm_eval_test.py runs it",
    "serve": "it goes on until it is stopped; tests/cli/serve_test.py runs and stops it",
}
# Words of training commands that even --train-all leaves out, and why.
ELSEWHERE = {
    "tfds_data_dir": "needs a data set of TensorFlow Datasets; tests/data/sources reads one",
    "distributed.enabled": "needs several processes; tests/sharding starts two",
    "retrofit:my/llama": "needs a model of others; the page makes one of its own, and retrofits it",
    "back_translation=": "needs two models that translate; tests/data runs the module",
}
EXAMPLES = {
    "README.md": "documented_names_test.py runs it",
    "docs/api.md": "documented_names_test.py runs them",
    "docs/serving.md": "needs a server; tests/serving runs OpenAI's client and mt.serve",
    "docs/quantization.md": "tests/runs/quantize_test.py quantises, compares and saves",
}
FILES = {"def get_config(": "my_run.py", "def features(": "my_features.py"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, small_run: Any) -> Any:
    """Command lines that have been carried out, all in one folder."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(folder, pages(REPOSITORY), small_run)
        yield set()


@pytest.mark.parametrize("name", [*TUTORIALS, *GUIDES])
def test_a_page_can_be_followed(name, done, monkeypatch, request):
    trains_all = request.config.getoption("--train-all")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    names: dict[str, Any] = {}
    page = list(steps((REPOSITORY / name).read_text()))
    for number, step in enumerate(page):
        if isinstance(step, str):
            if name not in EXAMPLES:
                _run_example(step, names)
            continue
        if trains_all and step[0] in ("train", "find-lr"):
            if any(words in " ".join(step) for words in ELSEWHERE):
                continue
            if not _is_read(step, page[number + 1 :]):
                # Else it would go on with the run of another command.
                step = [*step, f"--config.workdir=others/{name.replace('/', '_')}_{number}"]
        elif name not in TUTORIALS and not _is_for_here(step):
            continue
        elif step[0] in ("train", "find-lr") and not _is_read(step, page[number + 1 :]):
            step = ["inspect", *(word for word in step[1:] if word.startswith("--config"))]
        line = " ".join(step)
        if step[0].replace("_", "-") in COMMANDS or line in done:
            continue
        done.add(line)
        first, *words = smallest(step)
        try:
            command(first, words)
        except SystemExit as error:
            pytest.fail(f"{name}: {line}: exit code {error.code}")


def _is_for_here(step: list[str]) -> bool:
    """Whether a guide's command can be carried out: its runs are there, or it reads none."""
    runs = [word.partition("=")[2] for word in step if word.startswith("--model=")]
    if step[0] == "compare":
        groups = [word.rpartition("=")[2] for word in step[1:] if not word.startswith("--")]
        runs = [run for group in groups for run in group.split(",")]
    return step[0] not in ("train", "find-lr", "inspect") and all(
        pathlib.Path(run).exists() for run in runs
    )


def _run_example(code: str, names: dict[str, Any]) -> None:
    """Runs a block of Python; one that a command reads becomes the file that the page names."""
    for definition, file in FILES.items():
        if definition in code:
            pathlib.Path(file).write_text(code, encoding="utf-8")
    exec(compile(code, "example", "exec"), names)


def _is_read(words: list[str], later: list[Any]) -> bool:
    """Whether a later step reads the run of a training command that is not written already."""
    config = parse(find_command("train"), [word for word in words[1:] if "--config" in word]).config
    if config is None or pathlib.Path(config.workdir).exists():
        return False
    run = re.compile(rf"{re.escape(config.workdir)}(?![\w/])")
    return any(run.search(step if isinstance(step, str) else " ".join(step[1:])) for step in later)


def test_what_is_left_out_is_there():
    assert all(list(steps((REPOSITORY / name).read_text())) for name in EXAMPLES)
