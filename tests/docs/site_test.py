"""The site's menu has every page, its reference every public name, and its links lead somewhere.

`mkdocs build --strict`, which `make docs` and CI run, checks the rest.
"""

import importlib.util
import re

import pytest
import yaml

import megatransformer_jax as mt


@pytest.fixture(scope="module")
def hooks(repository):
    path = repository / "docs" / "mkdocs_hooks.py"
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_menu_has_every_page_once(repository, hooks):
    menu = yaml.safe_load((repository / "mkdocs.yml").read_text())["nav"]
    docs = repository / "docs"
    pages = [str(path.relative_to(docs)) for path in docs.rglob("*.md")]
    assert sorted(_names(menu)) == sorted([*pages, *hooks.OUTSIDE.values()])


def _names(menu) -> list[str]:
    if isinstance(menu, str):
        return [menu]
    entries = menu.values() if isinstance(menu, dict) else menu
    return [name for entry in entries for name in _names(entry)]


def test_the_reference_has_every_public_name_once(repository):
    text = (repository / "docs" / "reference.md").read_text()
    named = re.findall(r"^::: megatransformer_jax\.(\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted(mt.__all__)


@pytest.mark.parametrize(
    ("path", "link", "expected"),
    [
        ("docs/a.md", "b.md#c", "b.md#c"),
        ("docs/a.md", "../CHANGELOG.md", "changes.md"),
        ("docs/a.md", "../benchmarks/README.md#x", "benchmarks.md#x"),
        ("docs/tutorials/a.md", "../../CONTRIBUTING.md", "../contributing.md"),
        ("docs/tutorials/a.md", "../b.md", "../b.md"),
        ("docs/a.md", "../README.md#install", "README.md#install"),
        ("docs/a.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
        ("CHANGELOG.md", "docs/tutorials/a.md", "tutorials/a.md"),
        ("benchmarks/README.md", "../docs/cost.md#b", "cost.md#b"),
    ],
)
def test_links_lead_to_the_same_page_on_the_site(hooks, path, link, expected):
    assert hooks.with_links_of_the_site(f"x ([t]({link}))", path) == f"x ([t]({expected}))"
