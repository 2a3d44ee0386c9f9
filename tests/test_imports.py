"""Imports point in one direction, so that each part can be read and used without the parts above it."""

import ast
import graphlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "posenc_jax"

# Each part (a folder or module of the package) may import itself and the parts before it.
ORDER = [
    {"untrusted"},
    {"documents", "schema", "errors"},
    {"files", "identity", "linear", "distributed"},
    {"registry"},
    {"command", "data_config", "encodings", "model_config", "results", "tasks", "training_config"},
    {"evaluation_config", "layer_config", "task_config"},
    {"config"},
    {"attention", "data", "interop", "positions"},
    {"models"},
    {"training"},
    {"evaluation", "reporting"},
    {"catalogue", "compare", "runs"},
    {"encodings.__main__", "interop.export", "generation"},
    {"generate", "walkthrough"},
    {"walkthrough.__main__"},
]
COMMANDS = {"interop.export"}  # and every __main__


def part(module: str) -> str:
    """The part that a module belongs to: its first name, or its first two names if it is a command."""
    names = module.split(".")[1:]
    return ".".join(names[: 2 if names[-1] == "__main__" or ".".join(names) in COMMANDS else 1])


def name_of(path: Path) -> str:
    """The module name of a file. A package has the name of its folder."""
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(path: Path):
    """The modules of the package that a file imports, including imports inside functions."""
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


def test_settings_are_imported_without_jax():
    """Commands check jax's environment variables first, because looking up an encoding imports jax."""
    assert heavy_imports("import launch, configs.base, posenc_jax.encodings") == set()
    assert heavy_imports("import posenc_jax.encodings; posenc_jax.encodings.load('rope')") == {"jax"}


def test_runs_are_imported_without_pytorch():
    """Some libraries import PyTorch if it is installed, which takes two seconds."""
    assert heavy_imports("import posenc_jax.runs.run, posenc_jax.runs.train") == {"jax"}


def heavy_imports(program):
    """Which heavy libraries a program imports."""
    program += "; import sys; print(*{'jax', 'torch', 'tensorflow', 'wandb'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def test_no_modules_import_each_other_in_a_circle():
    sorter = graphlib.TopologicalSorter({module: set(imported(path)) - {module} for module, path in MODULES.items()})
    sorter.prepare()  # raises CycleError
