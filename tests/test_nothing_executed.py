"""Data is read as data: nothing in text, caches, checkpoints, records or archives is ever executed.

The tests fail if a pickle that looks up a name is loaded from a file (this is how pickles execute code), or if a Python
file of a workdir is run. Cluster jobs are not covered: submitit pickles the command of the user who submits it.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compile_flags

ROOT = Path(__file__).parent.parent
FOLDERS = ("posenc_jax", "experiments", "benchmarks", "configs")
TINY = (
    "--config=configs/rope_extrap.py:size=smoke",
    "--config.data.tokenizer=bpe",
    "--config.data.vocab_size=300",
    "--config.model.num_layers=1",
    "--config.training.length=32",
    "--config.training.duration=2 steps",
    "--config.training.warmup=1 steps",
    "--config.evaluation.lengths=(32,64)",
    "--config.evaluation.rope_scalings=('none','ntk')",
    "--config.evaluation.windows=2",
    "--config.evaluation.resamples=100",
)
HOOK = """
import os, sys

def refuse(event, arguments):
    if event == "pickle.find_class":
        print("unpickled", arguments, file=sys.stderr, flush=True)
        os._exit(77)
    if event == "open" and str(arguments[0]).endswith((".py", ".pyc", ".pkl", ".pickle")):
        if os.path.realpath(arguments[0]).startswith(os.environ["WORKDIR"] + "/"):
            print("opened", arguments, file=sys.stderr, flush=True)
            os._exit(78)

sys.addaudithook(refuse)
"""
LAUNCH = "import runpy\nsys.argv = ['launch.py', *sys.argv[1:]]\nrunpy.run_path('launch.py', run_name='__main__')\n"
READ = """
from pathlib import Path
from posenc_jax.data import tokens
from posenc_jax.evaluation.window_sums import read_sums
from posenc_jax.runs import trained

workdir = Path(sys.argv[1])
run = trained.load(workdir)
dataset = tokens.prepare(run.config.data)
measured, documents, record = read_sums(workdir / "windows.npz")
text = dataset.splits["test"].tokens[:50]
print(len(measured) > 5, record["command"][:6], dataset.tokenizer.decode(text) != b"", run.model is not None)
"""


def watched(program, workdir, *arguments):
    """Run a program in a separate process, which exits with 77 or 78 if something is refused."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(workdir.parent / "cache"),
        "XLA_FLAGS": compile_flags.XLA_FLAGS,
        "JAX_PLATFORMS": "cpu",
        "WORKDIR": str(workdir.resolve()),
    }
    command = [sys.executable, "-c", HOOK + program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a finished run on a small text, with programs planted next to its files."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("Some words, and then some other words. " * 200)
    workdir = folder / "run"
    ran = watched(LAUNCH, workdir, *TINY, f"--config.data.path={folder / 'text.txt'}", f"--workdir={workdir}")
    assert ran.returncode == 0, ran.stderr
    for name in ("config.py", "base.py", "jax.py", "sitecustomize.py", "conftest.py"):
        (workdir / name).write_text("raise SystemExit('run')")
    return workdir


def test_the_hook_sees_what_it_is_for(tmp_path):
    unpickling = "import pickle, pathlib\npickle.loads(pickle.dumps(pathlib.Path()))"
    assert watched(unpickling, tmp_path).returncode == 77
    (tmp_path / "config.py").write_text("")
    assert watched("open(os.environ['WORKDIR'] + '/config.py')", tmp_path).returncode == 78


def test_data_checkpoint_tokenizer_and_measurements_are_read_without_unpickling(workdir):
    ran = watched(READ, workdir, str(workdir))
    assert (ran.returncode, ran.stdout) == (0, "True python True True\n"), ran.stderr


def test_a_run_goes_on_and_is_reported_from_its_records_alone(workdir):
    (workdir / "report.md").unlink()
    text = workdir.parent / "text.txt"
    ran = watched(LAUNCH, workdir, *TINY, f"--config.data.path={text}", f"--workdir={workdir}")
    assert ran.returncode == 0, ran.stderr
    assert "step 1/2" not in ran.stdout
    assert (workdir / "report.md").exists()


UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
REFUSED = {"eval", "exec", "compile", "np.fromfile", "np.loadtxt", "np.genfromtxt", "torch.load"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_source_can_unpickle_evaluate_or_unpack(folder):
    paths = [*(ROOT / folder).rglob("*.py"), ROOT / "launch.py"]
    assert len(paths) > 5
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not UNPICKLERS.intersection(imported(tree)), path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, shown = ast.unparse(call.func), f"{path}: {ast.unparse(call)}"
            assert name not in REFUSED, shown
            assert name.rpartition(".")[2] not in ("extract", "extractall"), shown
            if name in ("np.load", "numpy.load"):
                assert "allow_pickle=False" in map(ast.unparse, call.keywords), shown
