"""A topic has one file, tests stand where it stands, and neither grows without bounds."""

import pathlib

import layout
import pytest

# About what the layout has, with room to grow by a few files of fair size, not by many small ones.
MAX_FILES = 347
MIN_MEDIAN_LINES = 150
MAX_FILE_LINES = 600
MAX_IMPORT_PERCENT = 7.5
MAX_FILES_OF_A_PROMPT = 46
MAX_SHIM_LINES = 10

# Folders of tests that no folder of the package stands for.
OWN_FOLDERS = {"architecture", "benchmarks", "docs", "support", "experiments"}


def test_the_layout_keeps_its_limits(repository):
    counted = layout.count(repository)
    assert counted.files <= MAX_FILES
    assert counted.median_lines >= MIN_MEDIAN_LINES
    assert counted.longest[0] <= MAX_FILE_LINES
    assert counted.small_with_one_importer == []
    assert counted.import_lines_percent <= MAX_IMPORT_PERCENT
    assert counted.files_of_a_prompt <= MAX_FILES_OF_A_PROMPT


def test_commands_of_experiments_are_shims(repository):
    shims = sorted((repository / "experiments").glob("*.py"))
    assert {path.stem for path in shims} >= {"train", "generate", "evaluate"}
    lengths = {path.name: len(path.read_text().splitlines()) for path in shims}
    assert max(lengths.values()) <= MAX_SHIM_LINES, lengths


def test_counts_are_those_of_a_tree_counted_by_hand(tmp_path):
    for name in ("cli", "generation", "models"):
        (tmp_path / "megatransformer_jax" / name).mkdir(parents=True)
        (tmp_path / "megatransformer_jax" / name / "__init__.py").touch()
    package = tmp_path / "megatransformer_jax"
    (package / "cli" / "generate.py").write_text(
        "from megatransformer_jax.generation.a import (\n    x,\n    y,\n)\n" + "x\n" * 60
    )
    (package / "cli" / "apart.py").write_text("import megatransformer_jax.models.b\n")
    (package / "generation" / "a.py").write_text(
        "def f():\n    from megatransformer_jax.models.b import z\n"
    )
    (package / "models" / "b.py").write_text("x = 1\n" * 3)
    counted = layout.count(tmp_path)
    assert counted == layout.Layout(
        files=4,
        lines=64 + 1 + 2 + 3,
        median_lines=2.5,
        longest=(64, "megatransformer_jax.cli.generate"),
        small_with_one_importer=["megatransformer_jax.generation.a"],
        import_lines_percent=100 * 6 / 70,
        files_of_a_prompt=2,
    )


def test_tests_stand_where_their_module_stands(repository):
    """`tests/models/core_depth_test.py` tests `models/core.py`, as `core_test.py` does."""
    assert misplaced_tests(repository) == []


@pytest.mark.parametrize(
    ("test", "is_misplaced"),
    [
        ("models/core_test.py", False),
        ("models/core_depth_test.py", False),
        ("models/depth_test.py", True),
        ("models/cores_test.py", True),
        ("core_test.py", True),
        ("docs/links_test.py", False),
        ("models/core.py", True),
        ("support/tiny.py", False),
    ],
)
def test_a_misplaced_test_is_seen(tmp_path, test, is_misplaced):
    (tmp_path / "megatransformer_jax" / "models").mkdir(parents=True)
    (tmp_path / "megatransformer_jax" / "models" / "core.py").touch()
    path = tmp_path / "tests" / test
    path.parent.mkdir(parents=True)
    path.touch()
    assert misplaced_tests(tmp_path) == ([test] if is_misplaced else [])


def misplaced_tests(repository: pathlib.Path) -> list[str]:
    """Files below tests/ that are named after no module of the package's folder of that name."""
    tests, package = repository / "tests", repository / "megatransformer_jax"
    misplaced = []
    for path in sorted(tests.rglob("*.py")):
        place = path.relative_to(tests)
        if place.parts[0] in OWN_FOLDERS or path.name == "conftest.py":
            continue
        modules = {module.stem for module in (package / place.parent).glob("*.py")}
        stem = path.stem.removesuffix("_test")
        is_named_after_one = any(stem == name or stem.startswith(f"{name}_") for name in modules)
        if not (path.stem.endswith("_test") and is_named_after_one):
            misplaced.append(str(place))
    return misplaced
