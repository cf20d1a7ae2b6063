"""Commands, options and files that the documentation names are there."""

import ast
import contextlib
import importlib
import io
import json
import re
from typing import Any

import numpy as np
import pytest
from markdown_pages import commands, pages, python_blocks

import megatransformer_jax as mt
from megatransformer_jax.checkpoints.folders import format_named
from megatransformer_jax.checkpoints.foreign import config_to
from megatransformer_jax.cli import flags, lm_eval
from megatransformer_jax.cli.commands import find_command
from megatransformer_jax.config.build import build, configure, save_config
from megatransformer_jax.config.option import UserError, options_of, sections_of
from megatransformer_jax.config.run_kinds import AllOptions

OPTIONS = {option.path for option in options_of(AllOptions)}
# A file of the workdir, and attributes of `mt.Model`.
NO_OPTIONS = {"train.log", "model.module", "model.params", "model.weights", "model.py"}
SECTIONS = {path for path, _, _ in sections_of(AllOptions)}
# Names in code font that stand for something of another project, or of the reader's.
ELSEWHERE = {
    *(
        "CUDA_VISIBLE_DEVICES",
        "GpuTargetConfigProto",
        "QArray",
        "cost_analysis",
        "coco_captions",
        "pydoc_data",
        "topics",
    ),
    *("lm", "utils", "tiff", "mp3", "my_run", "my_features"),
}


def check(command: list[str]) -> None:
    """Parses a command such as ['train', '--config=...']."""
    name, *words = command
    if name.replace("_", "-") != "lm-eval":
        flags.parse(find_command(name.replace("_", "-")), words)
    elif words:
        lm_eval.parse([word for word in words if word not in (lm_eval.ONLINE, lm_eval.DEBUG)])


def test_commands_are_accepted(repository, tmp_path, monkeypatch):
    (tmp_path / "experiments").symlink_to(repository / "experiments")
    (tmp_path / "runs" / "recurrent").mkdir(parents=True)
    save_config(build({}), tmp_path / "runs" / "recurrent" / "config.json")
    # The plain models that become recurrent ones.
    values = config_to(format_named("llama"), configure("modern_small", {}).model)
    for name in ("llama", "small_llama"):
        (tmp_path / "my" / name).mkdir(parents=True)
        (tmp_path / "my" / name / "config.json").write_text(json.dumps(values))
    tutorial = (repository / "docs" / "tutorials" / "own_text.md").read_text()
    (tmp_path / "my_run.py").write_text(python_blocks(tutorial)[0])
    monkeypatch.chdir(tmp_path)
    count = 0
    for page in pages(repository):
        for command in commands(page.read_text()):
            try:
                check(command)
            except UserError as error:
                pytest.fail(f"{page.name}: {' '.join(command)}: {error}")
            count += 1
    assert count >= 60


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--config.preset=tiny", "--config.train.step=1"],
        ["train", "--config.preset=tiny", "--absent=1"],
        ["inspect", "--config.preset=absent"],
        ["compare", "runs/a", "--absent=1"],
        ["generate", "--model=runs/a", "--prompt=a", "--absent=1"],
        ["evaluate", "--model=runs/a", "--absent=1"],
        ["absent", "--model=runs/a"],
        ["lm_eval", "run", "--model", "megatransformer", "--model_args", "path=a,absent=1"],
    ],
)
def test_a_wrong_command_is_seen(command):
    with pytest.raises(UserError):
        check(command)


def test_commands_are_found_whole():
    text = (
        "    . x && nohup .venv/bin/megatransformer train --a=1 > log 2>&1 &\n"
        "`megatransformer train --inline`\n"
        "```\nmegatransformer inspect --fenced\n```\n"
        "    python -m experiments.train --b=2 \\\n        --c=\"('d', 'e')\"  # words\n"
        '    gcloud ssh --command="cd f &&\n'
        '      megatransformer train --g=3 \\\n      --h=4"\n'
    )
    assert list(commands(text)) == [
        ["train", "--a=1"],
        ["train", "--b=2", "--c=('d', 'e')"],
        ["inspect", "--fenced"],
        ["train", "--g=3", "--h=4"],
    ]


def test_examples_in_python_import_what_there_is(repository):
    count = 0
    for page in pages(repository):
        for block in python_blocks(page.read_text()):
            for node in ast.walk(ast.parse(block)):
                match node:
                    case ast.ImportFrom(module=str(module), names=aliases):
                        for alias in aliases:
                            if not hasattr(importlib.import_module(module), alias.name):
                                importlib.import_module(f"{module}.{alias.name}")
                    case ast.Attribute(value=ast.Name(id="mt"), attr=name):
                        assert name in mt.__all__, f"{page.name}: mt.{name}"
                        count += 1
    assert count >= 10


@pytest.mark.slow
def test_examples_of_the_api_run(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    blocks = python_blocks((repository / "docs" / "api.md").read_text())
    names: dict[str, Any] = {}
    # The last one needs the run of an experiment with images.
    for block in blocks[:-1]:
        exec(compile(block, "docs/api.md", "exec"), names)
    assert "--config=image" in blocks[-1] and len(blocks) >= 8
    assert names["metrics"]["loss"] > 0 and names["trainer"].step_number == 30
    assert names["trace"].residuals.shape == (8, 1, 7)
    assert names["out"].logits.shape[:2] == (2, 7)
    assert [row["depth"] for row in names["report"].rows] == [1, 4]
    np.testing.assert_allclose(names["logits"], names["model"]("abc", depth=2).logits, atol=1e-5)
    # The README's, on the run that was just made and some text; the run is cut short.
    (tmp_path / "runs" / "notebook").rename(tmp_path / "runs" / "recurrent")
    (tmp_path / "my" / "texts").mkdir(parents=True)
    for page in pages(repository):
        (tmp_path / "my" / "texts" / f"{page.stem}.txt").write_text(page.read_text())
    [block] = python_blocks((repository / "README.md").read_text())
    [last] = [line for line in block.splitlines() if line.endswith(".run()")]
    shown, names = io.StringIO(), {}
    with contextlib.redirect_stdout(shown):
        exec(compile(block.replace(last, f"step = {last[:-6]}.step()"), "README.md", "exec"), names)
    assert names["step"]["loss"] > 0 and "Iterations after token" in shown.getvalue()


def test_options_exist(repository):
    unknown = []
    for page in pages(repository):
        text = page.read_text()
        named = re.findall(r"--(?:no)?config\.([a-z_][a-z0-9_.]*[a-z0-9_])", text)
        unknown += [f"{page.name}: {name}" for name in named if name not in OPTIONS]
        sections = "|".join(section for section in SECTIONS if "." not in section)
        dotted = re.findall(rf"`((?:{sections})\.[a-z_.]*[a-z_])[`=]", text)
        known = OPTIONS | SECTIONS
        unknown += [
            f"{page.name}: {name}"
            for name in dotted
            if name not in known and name not in NO_OPTIONS
        ]
    assert unknown == []


def names_in_code(repository) -> set[str]:
    """Everything that Python code here defines, uses or has as a text, and the presets."""
    names = {path.stem for path in (repository / "gin").glob("*.gin")} | {"mt", "setup"}
    for folder in ("megatransformer_jax", "experiments", "benchmarks"):
        for path in (repository / folder).rglob("*.py"):
            names |= {path.stem, path.parent.name, "py"}
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                        names.add(name)
                    case ast.Name(id=name) | ast.Attribute(attr=name):
                        names.add(name)
                    case ast.arg(arg=str(name)) | ast.keyword(arg=str(name)):
                        names.add(name)
                    case ast.alias(name=name):
                        names.update(name.split("."))
                    case ast.Constant(value=str(text)) if re.fullmatch(r"[\w./]+", text):
                        names.update(re.split(r"[./]", text))
    return names


def test_names_in_code_font_are_those_of_the_code(repository):
    """Names with a dot, an underscore or a capital inside; CHANGELOG tells of the past."""
    known = names_in_code(repository) | ELSEWHERE
    unknown, count = [], 0
    for page in pages(repository):
        found = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\)|=[^`]*)?`", page.read_text())
        for name in found if page.name != "CHANGELOG.md" else ():
            if re.search(r"\w[._A-Z]+[a-z]", name):
                # Capitals at the end stand for numbers: `drawn_N.png`.
                parts = re.sub(r"_[A-Z]+\b", "_", name).split(".")
                unknown += [f"{page.name}: {name}" for part in parts if part not in known]
                count += 1
    assert unknown == []
    assert count >= 300


def test_files_exist(repository):
    """Names with a slash; capitals stand for something else, and a path may begin anywhere."""
    folders = ("megatransformer_jax", "experiments", "tests", "docs", "benchmarks")
    paths = [path for folder in folders for path in (repository / folder).rglob("*")]
    there = [f"/{path.relative_to(repository)}" for path in paths]
    absent = []
    for page in pages(repository):
        for name in re.findall(r"`([\w.]+/[\w/.]*\.(?:py|md|ipynb))`", page.read_text()):
            is_example = name != name.lower() or name.startswith(("runs/", "my/", "../"))
            if not is_example and not any(path.endswith(f"/{name}") for path in there):
                absent.append(f"{page.name}: {name}")
    assert absent == []
