"""Imports point downward, and the checker that says so sees those that do not."""

import pathlib

import pytest
from import_graph import find_cycle, layer_violations, module_files, read_imports


def test_imports_point_downward(repository):
    assert layer_violations(read_imports(repository)) == []


def test_there_are_no_cycles(repository):
    assert find_cycle(read_imports(repository)) is None


def test_the_whole_tree_is_read(repository):
    files = module_files(repository)
    assert "experiments.train" in files
    assert "megatransformer_jax.models.megatransformer" in files
    imported = {item.imported for item in read_imports(repository)}
    # train.py imports it inside a function.
    assert "megatransformer_jax.runs.train" in imported


@pytest.mark.parametrize(
    ("path", "statement", "reason"),
    [
        ("megatransformer_jax/ops/a.py", "from megatransformer_jax.nn import b", "layer 1"),
        ("megatransformer_jax/ops/a.py", "import megatransformer_jax.nn.b", "layer 1"),
        ("megatransformer_jax/ops/a.py", "from ..nn import b", "layer 1"),
        ("megatransformer_jax/ops/a.py", "def f():\n    from ..nn.b import x", "layer 1"),
        ("megatransformer_jax/data/a.py", "from megatransformer_jax.models import b", "layer 1"),
        ("megatransformer_jax/models/a.py", "from megatransformer_jax.data import b", "must not"),
        (
            "megatransformer_jax/training/a.py",
            "from megatransformer_jax.evaluation.b import x",
            "must not",
        ),
        ("megatransformer_jax/training/a.py", "from experiments.b import x", "layer 5"),
        ("megatransformer_jax/training/a.py", "import megatransformer_jax", "layer 5"),
        ("megatransformer_jax/config/a.py", "from megatransformer_jax.ops.b import x", "layer 0"),
    ],
)
def test_a_violation_is_caught(tmp_path, path, statement, reason):
    _write_tree(tmp_path)
    (tmp_path / path).write_text(statement)
    lines = layer_violations(read_imports(tmp_path))
    assert len(lines) == 1
    assert path in lines[0]
    assert reason in lines[0]


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("megatransformer_jax/models/a.py", "from megatransformer_jax.nn import b"),
        ("megatransformer_jax/evaluation/a.py", "from megatransformer_jax.training.b import x"),
        ("experiments/a.py", "from megatransformer_jax.evaluation import b"),
        ("megatransformer_jax/ops/a.py", "import numpy"),
    ],
)
def test_downward_imports_pass(tmp_path, path, statement):
    _write_tree(tmp_path)
    (tmp_path / path).write_text(statement)
    assert layer_violations(read_imports(tmp_path)) == []


def test_a_cycle_is_found(tmp_path):
    _write_tree(tmp_path)
    folder = tmp_path / "megatransformer_jax" / "nn"
    (folder / "a.py").write_text("from megatransformer_jax.nn.b import x")
    (folder / "b.py").write_text("from megatransformer_jax.nn import c")
    assert find_cycle(read_imports(tmp_path)) is None
    (folder / "c.py").write_text("def f():\n    from .a import y")
    cycle = find_cycle(read_imports(tmp_path))
    assert cycle == [f"megatransformer_jax.nn.{name}" for name in "abca"]
    (folder / "c.py").write_text("if TYPE_CHECKING:\n    from .a import y")
    assert find_cycle(read_imports(tmp_path)) is None


def test_a_folder_without_a_layer_is_an_error(tmp_path):
    _write_tree(tmp_path)
    folder = tmp_path / "megatransformer_jax" / "misc"
    folder.mkdir()
    (folder / "a.py").write_text("from megatransformer_jax.nn import b")
    with pytest.raises(KeyError, match="misc"):
        layer_violations(read_imports(tmp_path))


def _write_tree(root: pathlib.Path) -> None:
    folders = ("config", "ops", "data", "nn", "models", "training", "evaluation")
    for folder in [*(f"megatransformer_jax/{name}" for name in folders), "experiments"]:
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
        for name in "abc":
            (root / folder / f"{name}.py").touch()
    (root / "megatransformer_jax" / "__init__.py").touch()
