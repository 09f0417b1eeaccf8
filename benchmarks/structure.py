"""The tree of packages of a checkout: modules, lines, floors and imports; what is too long; what imports in circles.

    python benchmarks/structure.py                # this checkout
    python benchmarks/structure.py ../earlier     # another one, such as a git worktree of an earlier commit

An arrow goes from a module to a module that it imports, wherever the import stands: at the module's top level, inside a
function, or for types only. A floor is the length of the longest chain of arrows downwards, 1 for what imports nothing of
the package; members of a circle share one. Nothing of the checkout is imported: its files are parsed.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LONG_MODULE, LONG_CLASS = 280, 250

Graph = Mapping[str, set[str]]


@dataclass(frozen=True, kw_only=True)
class Module:
    """One file.

    Attributes:
        name: dotted, a package's `__init__` under the package's own name.
        is_package: it is an `__init__`.
        lines: of the file.
        classes: name and lines of each.
        imports: dotted names of the package's modules that it imports, each with where: `import`, `function` or `types`.
    """

    name: str
    is_package: bool
    lines: int
    classes: tuple[tuple[str, int], ...]
    imports: frozenset[tuple[str, str]]

    @property
    def package(self) -> str:
        """The package that the file lies in."""
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @property
    def arrows(self) -> set[str]:
        """The modules it imports."""
        return {name for name, _ in self.imports}


def read_modules(checkout: Path, root: str = "moe_ray") -> dict[str, Module]:
    """Every module of a checkout's package by its dotted name."""
    paths = {}
    for path in sorted((checkout / root).rglob("*.py")):
        parts = path.relative_to(checkout).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: _read(name, path, paths) for name, path in paths.items()}


def _read(name: str, path: Path, known: Container[str]) -> Module:
    text = path.read_text()
    tree = ast.parse(text)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = ((target, where) for node, where in _imports(tree, "import") for target in _targets(node, known))
    return Module(
        name=name,
        is_package=path.name == "__init__.py",
        lines=len(text.splitlines()),
        classes=tuple((node.name, (node.end_lineno or 0) - node.lineno + 1) for node in classes),
        imports=frozenset((target, where) for target, where in found if target != name),
    )


def _imports(node: ast.AST, where: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every import below a node and where it stands."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, where
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(child, "function")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(child, "types")
        else:
            yield from _imports(child, where)


def _targets(node: ast.Import | ast.ImportFrom, known: Container[str]) -> Iterator[str]:
    """The package's own modules among what is imported; `from package import module` names the module."""
    assert isinstance(node, ast.Import) or not node.level, "relative imports are not read"
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in known else str(node.module) for name in inner]
    yield from (name for name in names if name in known)


def circles(graph: Graph) -> list[tuple[str, ...]]:
    """Sets of nodes that all reach each other, each sorted."""
    reach = {node: _reachable(graph, node) for node in graph}
    found = {tuple(sorted(other for other in reach[node] if node in reach[other])) for node in graph}
    return sorted(members for members in found if members)


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph[node]
    return seen


def floors(graph: Graph) -> dict[str, int]:
    """The length of the longest chain of arrows from each node, the members of a circle counting as one node."""
    name_of = {node: node for node in graph} | {node: ring[0] for ring in circles(graph) for node in ring}
    below: dict[str, set[str]] = {name: set() for name in name_of.values()}
    for node, targets in graph.items():
        below[name_of[node]] |= {name_of[target] for target in targets} - {name_of[node]}
    known: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in known:
            known[name] = 1 + max((floor(other) for other in below[name]), default=0)
        return known[name]

    return {node: floor(name) for node, name in name_of.items()}


def children_graph(modules: Mapping[str, Module], parent: str) -> dict[str, set[str]]:
    """The packages and modules right inside `parent`, and which import which."""

    def child(name: str) -> str | None:
        inside = name.removeprefix(f"{parent}.")
        return f"{parent}.{inside.partition('.')[0]}" if inside != name else None

    graph: dict[str, set[str]] = {found: set() for found in map(child, modules) if found}
    for module in modules.values():
        importing = child(module.name)
        if importing:
            graph[importing] |= {other for other in map(child, module.arrows) if other and other != importing}
    return graph


def package_rows(
    modules: Mapping[str, Module], root: str = "moe_ray"
) -> list[tuple[str, int, int, str, int, int, int]]:
    """Per package: indented name, modules, lines, floor among its siblings, arrows inside, out of and into it.

    The root's row is of the modules right inside it, with the range of their floors.
    """
    arrows = [(module.package, modules[target].package) for module in modules.values() for target in module.arrows]
    rows = []
    for package in sorted({module.package for module in modules.values()}):
        members = [module for module in modules.values() if module.package == package]
        parent = package.rpartition(".")[0]
        files = [module.name for module in members if not module.is_package]
        if parent:
            floor = str(floors(children_graph(modules, parent))[package])
        else:
            of = floors(children_graph(modules, root))
            held = [of[name] for name in files]
            floor = f"{min(held)}-{max(held)}" if held else "-"
        name = "  " * package.count(".") + package.rpartition(".")[2] + "/"
        inside = sum(a == b == package for a, b in arrows)
        out = sum(a == package != b for a, b in arrows)
        into = sum(b == package != a for a, b in arrows)
        rows.append((name, len(members), sum(module.lines for module in members), floor, inside, out, into))
    return rows


def describe(checkout: Path, root: str = "moe_ray") -> str:
    """All of it as text."""
    modules = read_modules(checkout, root)
    lines = [f"{'package':28}{'modules':>8}{'lines':>8}{'floor':>8}{'arrows inside':>15}{'out':>6}{'in':>6}"]
    for name, number, length, floor, inside, out, into in package_rows(modules, root):
        lines.append(f"{name:28}{number:8}{length:8}{floor:>8}{inside:15}{out:6}{into:6}")
    kinds = [kind for module in modules.values() for _, kind in module.imports]
    lines += [
        "",
        f"{len(modules)} modules, {sum(module.lines for module in modules.values())} lines, {len(kinds)} arrows: "
        + ", ".join(f"{kinds.count(kind)} {words}" for kind, words in _KINDS.items()),
    ]
    for parent in (root, f"{root}.orchestration"):
        graph = children_graph(modules, parent)
        if graph:
            within = {name: module.arrows for name, module in modules.items() if name.startswith(parent)}
            within = {name: {other for other in targets if other in within} for name, targets in within.items()}
            lines.append(
                f"floors of {parent}: {max(floors(graph).values())} of packages and modules right inside, "
                f"{max(floors(within).values())} of single modules"
            )
    rings = circles({name: module.arrows for name, module in modules.items()})
    long_modules = sorted((-m.lines, m.name) for m in modules.values() if m.lines > LONG_MODULE)
    long_classes = sorted(
        (-length, f"{m.name}.{name}") for m in modules.values() for name, length in m.classes if length > LONG_CLASS
    )
    lines.append("circles: " + ("; ".join(" <-> ".join(ring) for ring in rings) or "none"))
    lines.append(f"modules over {LONG_MODULE} lines: " + _listed(long_modules))
    lines.append(f"classes over {LONG_CLASS} lines: " + _listed(long_classes))
    return "\n".join(lines)


_KINDS = {"import": "at import", "function": "inside functions", "types": "for types only"}


def _listed(found: list[tuple[int, str]]) -> str:
    return ", ".join(f"{name} ({-length})" for length, name in found) or "none"


def main() -> None:
    """Prints the tree of a checkout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    print(describe(parser.parse_args().checkout))


if __name__ == "__main__":
    main()
