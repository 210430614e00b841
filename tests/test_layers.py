"""The layers of the package and the absence of import cycles, read from the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up; rooms on one line do not know each other. A module beside the rooms counts as a room.
LAYERS = [
    {"__init__", "errors", "garbage", "streams"},
    {"options", "report", "untrusted"},
    {"arguments", "signals"},
    {"tensors"},
    {"families"},
    {"checkpoint"},
    {"tokens", "launch"},
    {"training"},
    {"cluster"},
    {"commands"},
    {"cli"},
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}


def modules(folder: Path) -> dict[str, Path]:
    """Dotted name → file of every module in a package's folder."""
    files = sorted(folder.rglob("*.py"))
    return {".".join(f.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, wherever the import stands: in a function or under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            assert node.level == 0, f"{file}: write imports in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module


def graph(folder: Path) -> dict[str, set[str]]:
    known = modules(folder)
    return {name: set(imports(file, known)) for name, file in known.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_its_place():
    assert {room(name) for name in modules(ROOT / "entrypoints" / "slipway")} == HEIGHT.keys()


def test_no_arrow_runs_back():
    found = [
        f"{name} imports {other}"
        for name, others in graph(ROOT / "entrypoints" / "slipway").items()
        for other in others
        if room(name) != room(other) and HEIGHT[room(other)] >= HEIGHT[room(name)]
    ]
    assert found == []


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, or []."""
    left = {name: {other for other in others if other != name} for name, others in edges.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("folder", ["entrypoints/slipway", "images", "benchmarks"])
def test_no_module_imports_itself_by_way_of_others(folder):
    # A package's own __init__ may be named by the modules in it: what it gives them is defined before it needs them.
    edges = graph(ROOT / folder)
    packages = {name for name, file in modules(ROOT / folder).items() if file.name == "__init__.py"}
    inner = {
        name: {other for other in others if not (other in packages and name.startswith(f"{other}."))}
        for name, others in edges.items()
    }
    assert cycle(inner) == []


def test_the_check_finds_a_cycle():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_nothing_imports_the_folder():
    """The index has a module called `entrypoints`, which others install: our folder of that name is no package."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name != "build" and path.name[0] != "."]
    files = [file for folder in folders for file in folder.rglob("*.py")]  # not of .venv and .venv-transformers5
    assert len(files) > 200
    for file in [*files, *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "entrypoints" for name in names), file


def test_the_verbs_are_thin():
    """Arguments in, one call of the library, one summary out. What is longer belongs into a room below."""
    for file in (ROOT / "entrypoints" / "slipway" / "commands").glob("*.py"):
        functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
        for function in functions:
            code = [node for node in function.body if not isinstance(node, (ast.Expr, ast.ImportFrom))]
            lines = sum(node.end_lineno - node.lineno + 1 for node in code)
            assert lines <= 40 and not file.stem.endswith("_"), f"{file.name}: {function.name} has {lines} lines"
