"""The import graph of a source tree, read with `ast`: nothing is executed."""

import ast
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping

PACKAGE = "megatransformer_jax"

# Layers of docs/architecture.md. `experiments` stands for its own top-level folder.
LAYERS: Mapping[str, int] = {
    "config": 0,
    "types": 0,
    "streams": 0,
    "extras": 0,
    "storage": 0,
    "failures": 0,
    "sharding": 0,
    "compiled": 1,
    "ops": 1,
    "data": 1,
    "nn": 2,
    "models": 3,
    "losses": 4,
    "checkpoints": 4,
    "generation": 4,
    "training": 5,
    "evaluation": 5,
    "runs": 6,
    "model": 7,
    "export": 7,
    "api": 8,
    "serving": 9,
    "face": 10,
    "cli": 10,
    "experiments": 11,
}

# Forbidden although they do not point upward: (importer, imported).
FORBIDDEN = {
    ("training", "evaluation"),
    ("ops", "data"),
    ("nn", "data"),
    ("models", "data"),
    ("data", "ops"),
    ("config", "sharding"),
}


@dataclasses.dataclass(frozen=True)
class Import:
    """One import statement that names a module of the tree."""

    importer: str
    imported: str
    place: str  # file:line
    is_for_types: bool = False  # Under `if TYPE_CHECKING`: never executed.


def module_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Every module of the package and of experiments, by its dotted name."""
    files = {}
    for folder in (PACKAGE, "experiments"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def read_imports(root: pathlib.Path) -> list[Import]:
    """All imports between modules of the tree, those inside functions as well."""
    files = module_files(root)
    found = []
    for importer, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for_types = _nodes_for_types(tree)
        for node in ast.walk(tree):
            place = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            for imported in _imported_modules(node, importer, path, files):
                found.append(Import(importer, imported, place, node in for_types))
    return found


def layer_of(module: str) -> str:
    """The layer's name: 'data' for megatransformer_jax.data.packing.

    Raises:
      KeyError: if the folder has no place in the table of layers.
    """
    parts = module.split(".")
    # The package itself is the face of the API: what stands below it never imports it.
    name = parts[0] if parts[0] != PACKAGE else (parts[1] if len(parts) > 1 else "face")
    if name not in LAYERS:
        raise KeyError(f"{module}: {name!r} has no layer; give it one in LAYERS")
    return name


def layer_violations(imports: Iterable[Import]) -> list[str]:
    """One line per import that points upward or is forbidden."""
    lines = []
    for item in imports:
        importer, imported = layer_of(item.importer), layer_of(item.imported)
        if LAYERS[imported] > LAYERS[importer]:
            reason = f"layer {LAYERS[importer]} imports layer {LAYERS[imported]}"
        elif (importer, imported) in FORBIDDEN:
            reason = f"{importer} must not import {imported}"
        else:
            continue
        lines.append(f"{item.place}: {item.importer} imports {item.imported}: {reason}")
    return lines


def find_cycle(imports: Iterable[Import]) -> list[str] | None:
    """Modules that import each other in a circle, first one repeated at the end; None if none.

    Imports that only a type checker sees close no circle.
    """
    edges: dict[str, set[str]] = {}
    for item in imports:
        if item.is_for_types:
            continue
        edges.setdefault(item.importer, set()).add(item.imported)
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for following in sorted(edges.get(module, ())):
            cycle = visit(following, [*path, module])
            if cycle:
                return cycle
        done.add(module)
        return None

    for module in sorted(edges):
        cycle = visit(module, [])
        if cycle:
            return cycle
    return None


def _nodes_for_types(tree: ast.Module) -> set[ast.AST]:
    """Everything inside `if TYPE_CHECKING` blocks."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }


def _imported_modules(
    node: ast.AST, importer: str, path: pathlib.Path, files: Mapping[str, pathlib.Path]
) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(node, importer, path)
        # `from package import name`: the name may be a module or something inside the package.
        names = [f"{base}.{alias.name}" for alias in node.names]
        names = [name if name in files else base for name in names]
    else:
        return
    for name in dict.fromkeys(names):
        if name in files and name != importer:
            yield name


def _absolute(node: ast.ImportFrom, importer: str, path: pathlib.Path) -> str:
    if not node.level:
        return node.module or ""
    parts = importer.split(".")
    dropped = node.level - (path.name == "__init__.py")
    base = parts[: len(parts) - dropped]
    return ".".join([*base, node.module] if node.module else base)
