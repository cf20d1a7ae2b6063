"""What the layout costs a reader, counted from the sources: `python tests/architecture/layout.py`.

A folder as the argument counts another checkout, such as one of an older commit.
"""

import argparse
import ast
import dataclasses
import pathlib
import statistics

from import_graph import PACKAGE, module_files, read_imports

# Below this many lines a file that one other imports costs more to find than to read there.
SMALL = 60
# Commands whose first existing one is where a prompt starts; where it is generated from.
GENERATE = (f"{PACKAGE}.cli.generate", "experiments.generate")
# Between the command line and the model: reading a prompt's way means opening these.
ON_THE_WAY = (f"{PACKAGE}.cli", f"{PACKAGE}.runs", f"{PACKAGE}.generation", "experiments")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Counts over the package and the experiments; empty files are left out."""

    files: int
    lines: int
    median_lines: float
    longest: tuple[int, str]  # Its lines, and which file.
    small_with_one_importer: list[str]
    import_lines_percent: float
    files_of_a_prompt: int  # Files on the way from `generate` to the model; see ON_THE_WAY.


def count(root: pathlib.Path) -> Layout:
    """Counts the checkout at `root`."""
    texts = {
        module: (path, text)
        for module, path in module_files(root).items()
        if (text := path.read_text(encoding="utf-8")).strip()
    }
    lengths = {module: len(text.splitlines()) for module, (_, text) in texts.items()}
    edges = {(item.importer, item.imported) for item in read_imports(root)}
    importers = {module: sum(imported == module for _, imported in edges) for module in texts}
    longest = max(lengths, key=lengths.__getitem__)
    return Layout(
        files=len(lengths),
        lines=sum(lengths.values()),
        median_lines=statistics.median(lengths.values()),
        longest=(lengths[longest], longest),
        small_with_one_importer=sorted(
            module
            for module, length in lengths.items()
            if length < SMALL and importers[module] == 1
        ),
        import_lines_percent=100
        * sum(_import_lines(text) for _, text in texts.values())
        / sum(lengths.values()),
        files_of_a_prompt=len(_on_the_way(edges, texts.keys())),
    )


def _import_lines(text: str) -> int:
    return sum(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    )


def _on_the_way(edges: set[tuple[str, str]], modules: "set[str]") -> set[str]:
    """Everything that the generate command's imports reach, as far as it lies before the model."""
    start = next(name for name in GENERATE if name in modules)
    reached, open_modules = {start}, [start]
    while open_modules:
        importer = open_modules.pop()
        following = {imported for source, imported in edges if source == importer} - reached
        reached |= following
        open_modules.extend(following)
    return {
        module
        for module in reached & set(modules)
        if any(module == place or module.startswith(f"{place}.") for place in ON_THE_WAY)
    }


def main() -> None:
    """Prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = pathlib.Path(__file__).resolve().parents[2]
    parser.add_argument("root", nargs="?", type=pathlib.Path, default=here, help="a checkout")
    layout = count(parser.parse_args().root)
    print(f"files                        {layout.files}")
    print(f"lines                        {layout.lines}")
    print(f"median lines of a file       {layout.median_lines:g}")
    print(f"longest file                 {layout.longest[0]} ({layout.longest[1]})")
    print(f"under {SMALL}, one importer       {len(layout.small_with_one_importer)}")
    print(f"lines that import            {layout.import_lines_percent:.1f} %")
    print(f"files that a prompt passes   {layout.files_of_a_prompt}")


if __name__ == "__main__":
    main()
