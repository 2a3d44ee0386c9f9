"""Imports point one way, so that each part can be read and used without those above it."""

import ast
import graphlib
import itertools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "posenc_jax"

# Each room of the package may import those before it, and of its own group only itself.
ORDER = [
    {"untrusted", "schema", "errors", "linear"},
    {"files", "duration", "distributed"},
    {"results", "command", "encodings"},
    {"config"},
    {"attention", "data", "positions"},
    {"models"},
    {"training"},
    {"evaluation", "reporting"},
    {"runs", "walkthrough", "catalogue"},
]


def room(module: str) -> str:
    """The folder or file at the package's top that a module belongs to."""
    return module.split(".")[1]


def name_of(path: Path) -> str:
    """The module of a file; a package is named by its folder."""
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(path: Path):
    """Modules of the package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("posenc_jax."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "posenc_jax":
            for name in node.names:
                full = f"{node.module}.{name.name}"
                exists = (PACKAGE.parent / f"{full.replace('.', '/')}.py").exists()
                is_package = (PACKAGE.parent / full.replace(".", "/")).is_dir()
                yield full if exists or is_package else node.module


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py") if name_of(path) != "posenc_jax"}
PROGRAMS = {name for name in MODULES if name.endswith("__main__")}  # of `python -m`, which may import everything


@pytest.mark.parametrize("module", sorted(MODULES.keys() - PROGRAMS))
def test_a_module_imports_no_room_above_its_own(module):
    rank = {name: i for i, group in enumerate(ORDER) for name in group}
    own = room(module)
    for other in map(room, imported(MODULES[module])):
        assert other == own or rank[other] < rank[own], f"{module} imports {other}"


def test_the_order_names_every_room():
    assert set(map(room, MODULES)) == set(itertools.chain(*ORDER))


def test_no_modules_import_each_other_in_a_circle():
    sorter = graphlib.TopologicalSorter({module: set(imported(path)) - {module} for module, path in MODULES.items()})
    sorter.prepare()  # raises CycleError


def test_reporting_works_from_results_alone():
    rooms = {room(other) for module in MODULES if room(module) == "reporting" for other in imported(MODULES[module])}
    assert rooms == {"reporting", "results", "files", "untrusted"}
