"""What the tests of documentation read: pages, their headings, links and commands."""

import pathlib
import re
import shlex
from collections.abc import Iterator

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def pages(root: pathlib.Path) -> list[pathlib.Path]:
    """Every page of documentation."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


def links(text: str) -> list[str]:
    """Targets of all links and pictures, those in code left out."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ +(.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks(text: str) -> list[str]:
    """The fenced blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def steps(text: str) -> Iterator[list[str] | str]:
    """Commands, as words, and blocks of Python, as text, in the order of the page."""
    for part in re.split(r"(^```python\n.*?^```)", text, flags=re.MULTILINE | re.DOTALL):
        blocks = python_blocks(part)
        yield from blocks if blocks else commands(part)


def commands(text: str) -> Iterator[list[str]]:
    """Words of every `megatransformer ...` and `python -m experiments...` in blocks of code.

    Each begins with the command's own name, such as train.
    """
    code = "".join(line[4:] for line in text.splitlines(True) if line.startswith("    "))
    code += "".join(_FENCE.findall(text))
    quoted = re.findall(r'--command="(.*?)"(?:\n|$)', code, re.DOTALL)
    for block in [re.sub(r'--command=".*?"(?=\n|$)', "", code, flags=re.DOTALL), *quoted]:
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|[ /])(?:megatransformer |python3? -m experiments\.)(.*)", line)
            if found:
                yield shlex.split(re.split(r" (?:[|>&]|2>)", found[1])[0], comments=True)
