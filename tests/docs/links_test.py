"""Links in the documentation lead somewhere."""

import pytest
from markdown_pages import anchors, links, pages


def broken_links(page) -> list[str]:
    broken = []
    for link in links(page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def test_links_resolve(repository):
    found = pages(repository)
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in found}
    assert {page.name: broken for page in found if (broken := broken_links(page))} == {}


def test_every_page_is_linked_from_the_first(repository):
    docs = repository / "docs"
    linked = {name.partition("#")[0] for name in links((docs / "README.md").read_text())}
    paths = [path for kind in ("md", "ipynb") for path in docs.rglob(f"*.{kind}")]
    assert {str(path.relative_to(docs)) for path in paths} - linked == {"README.md"}
    assert "docs/README.md" in links((repository / "README.md").read_text())


@pytest.mark.parametrize("link", ["absent.md", "other.md#absent", "#absent", "picture.png"])
def test_a_broken_link_is_seen(tmp_path, link):
    (tmp_path / "other.md").write_text("# There it is, `really`\n")
    page = tmp_path / "page.md"
    page.write_text(
        f"# Page\n[a](other.md#there-it-is-really) [b](#page) [c]({link}) `[d](no.md)`\n"
    )
    assert broken_links(page) == [link]
