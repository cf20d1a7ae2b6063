"""The documentation site also has pages of the repository that do not lie in `docs/`."""

import pathlib
import posixpath
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# A page of the repository, and its name on the site.
OUTSIDE = {
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
}
# The site's own first page stands for the README, and has this section of it.
WHY = re.compile(r"^## Why depth recurrence\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
PLACES = {**OUTSIDE, "README.md": "README.md"}
_TARGET = re.compile(r"(?<=\]\()([^)\s#:]+)")


def on_files(files: "Files", config: Any) -> "Files":
    """Adds the pages that lie outside of `docs/`."""
    from mkdocs.structure.files import File  # noqa: PLC0415 (of the extra `docs`)

    for path, name in OUTSIDE.items():
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=with_links_of_the_site(text, path)))
    return files


def on_page_markdown(markdown: str, page: Any, **unused: Any) -> str:
    """Leads the links of a page in `docs/` to where their targets are on the site."""
    uri = page.file.src_uri
    if uri in OUTSIDE.values():
        return markdown
    markdown = with_links_of_the_site(markdown, f"docs/{uri}")
    if uri == "README.md":
        [section] = WHY.findall((REPOSITORY / "README.md").read_text(encoding="utf-8"))
        markdown += "\n" + with_links_of_the_site(section, "README.md")
    return markdown


def with_links_of_the_site(text: str, path: str) -> str:
    """The text of a page, with links that hold in the repository turned into links of the site.

    Args:
      text: of the page.
      path: of the page, from the root of the repository.
    """
    here = posixpath.dirname(PLACES.get(path, path.removeprefix("docs/")))

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1]))
        name = PLACES.get(target, target.removeprefix("docs/"))
        is_moved = target in PLACES or path in PLACES
        return posixpath.relpath(name, here or ".") if is_moved else match[1]

    return _TARGET.sub(moved, text)
