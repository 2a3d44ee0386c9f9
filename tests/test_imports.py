"""Imports point one way, so that each part can be read and used without those above it."""

import ast
import graphlib
import itertools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "posenc_jax"

# Each part, a folder or a module of the package, may import the parts before it, and itself.
ORDER = [
    {"untrusted"},
    {"schema", "errors"},
    {"files", "linear", "duration", "distributed"},
    {"command", "encodings", "results"},
    {"config"},
    {"attention", "data", "positions"},
    {"models"},
    {"training"},
    {"evaluation", "reporting"},
    {"catalogue", "walkthrough", "runs"},
    {"encodings.__main__", "walkthrough.__main__"},
]


def part(module: str) -> str:
    """The part that a module belongs to: its first name, or two if it is a command."""
    names = module.split(".")[1:]
    return ".".join(names[: 2 if names[-1] == "__main__" else 1])


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


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"posenc_jax"}))
def test_a_module_imports_none_above_it(module):
    rank = {name: i for i, group in enumerate(ORDER) for name in group}
    own = part(module)
    for other in map(part, imported(MODULES[module])):
        assert other == own or rank[other] < rank[own], f"{module} imports {other}"


def test_the_order_names_every_part():
    found = {part(module) for module in MODULES.keys() - {"posenc_jax"}}
    assert found == set(itertools.chain(*ORDER))


def test_no_modules_import_each_other_in_a_circle():
    sorter = graphlib.TopologicalSorter({module: set(imported(path)) - {module} for module, path in MODULES.items()})
    sorter.prepare()  # raises CycleError
