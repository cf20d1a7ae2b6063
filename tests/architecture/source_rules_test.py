"""Rules on source files that the linter does not know."""

import ast
import pathlib

import pytest
from import_graph import module_files

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
# What is called by keyword, with names that are not ours to group: a model's inputs, lm-eval's.
MANY_PARAMETERS = {"models/megatransformer.py:__call__", "evaluation/lm_eval.py:__init__"}
# libtpu can be told in no other way that there is no TPU here.
MAY_SET_ENVIRONMENT = "sharding/topology.py"
OUTSIDE = {("os", "environ"), ("os", "getenv"), ("os", "putenv"), ("sys", "argv"), ("absl", "app")}
FOLDERS = ("megatransformer_jax", "experiments", "tests", "benchmarks")


def _sources(repository: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for folder in FOLDERS for path in (repository / folder).rglob("*.py"))


def test_files_are_short(repository):
    lengths = {path: len(path.read_text().splitlines()) for path in _sources(repository)}
    assert lengths
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short(repository):
    long = []
    for path in module_files(repository).values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = _body_lines(node)
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    assert long == []


def test_functions_have_few_parameters(repository):
    """Those of a class come without `self`."""
    many, package = {}, repository / "megatransformer_jax"
    for path in module_files(repository).values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inputs = node.args
                names = [a.arg for a in inputs.posonlyargs + inputs.args + inputs.kwonlyargs]
                count = len([name for name in names if name not in ("self", "cls")])
                if count > MAX_PARAMETERS and path.is_relative_to(package):
                    many[f"{path.relative_to(package)}:{node.name}"] = count
    assert set(many) == MANY_PARAMETERS, many


def test_modules_say_what_they_are_for(repository):
    silent = []
    for path in module_files(repository).values():
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            silent.append(path)
    assert silent == []


def test_there_is_no_utils(repository):
    names = {path.stem for path in _sources(repository)}
    assert names.isdisjoint({"utils", "util", "helpers", "common", "misc"})


def test_only_commands_read_environment_and_flags(repository):
    lines = []
    package = repository / "megatransformer_jax"
    others = {*(package / "cli").rglob("*.py"), package / MAY_SET_ENVIRONMENT}
    for path in sorted(set(package.rglob("*.py")) - others):
        tree = ast.parse(path.read_text())
        lines += [f"{path}:{line}" for line in outside_reads(tree)]
    assert lines == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A']",
        "import os\nos.getenv('A')",
        "from os import environ",
        "import argparse",
        "import sys\nsys.argv",
        "from absl import flags\nflags.DEFINE_string('a', None, 'A.')",
        "from absl import flags\nflags.FLAGS.a",
        "from absl.flags import FLAGS",
        "def f():\n    global x\n    x = 1",
    ],
)
def test_outside_reads_are_seen(source):
    assert outside_reads(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.path.join('a')",
        "from absl import logging",
        "from absl import flags\nflags.FLAGS.mark_as_parsed()",
        "import sys\nif __name__ == '__main__':\n    print(sys.argv)",
    ],
)
def test_other_uses_pass(source):
    assert outside_reads(ast.parse(source)) == []


def outside_reads(tree: ast.Module) -> list[int]:
    """Lines that read the environment or the command line, or write a global name.

    What a module does when it is run as a program (`if __name__ == "__main__"`) is its own affair.
    """
    return [
        node.lineno
        for statement in tree.body
        if not _is_main_block(statement)
        for node in ast.walk(statement)
        if _reads_outside(node)
    ]


def _is_main_block(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def _reads_outside(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(
            value=ast.Attribute(value=ast.Name(id="flags"), attr="FLAGS"), attr=name
        ):
            # Some libraries must find their own flags parsed; that reads no value.
            return name not in ("is_parsed", "mark_as_parsed")
        case ast.Attribute(value=ast.Name(id="flags"), attr=name):
            return name.startswith("DEFINE")
        case ast.Attribute(value=ast.Name(id=module), attr=name):
            return (module, name) in OUTSIDE
        case ast.ImportFrom(module=module, names=aliases):
            names = {(module, alias.name) for alias in aliases}
            return module == "absl.flags" or not names.isdisjoint(OUTSIDE)
        case ast.Import(names=aliases):
            return any(alias.name == "argparse" for alias in aliases)
    return isinstance(node, ast.Global)


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
