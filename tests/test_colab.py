"""The Colab notebook: runs in a clean kernel at the smoke size, survives a stop, and installs and mounts correctly."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import rope_extrap
from tests.test_launch import ROOT, environment

NOTEBOOK = ROOT / "experiments" / "colab.ipynb"

# The first line after which there is something to save.
STOPPED = """
def print(text, end="\\n"):
    if text.startswith("step 10/60"):
        raise KeyboardInterrupt
    sys.stdout.write(text + end)
"""
GOES_ON = "del print"
FAILS = 'python("launch.py", "--config=configs/rope_extrap.py:size=huge")'


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def source(cell_id):
    return next(cell.source for cell in read().cells if cell.id == cell_id)


def injected(cell_source, **metadata):
    return nbformat.v4.new_code_cell(cell_source, metadata=metadata)


@pytest.fixture
def temporary(tmp_path):
    """A temporary folder for the notebook. A TensorBoard server that is still running is stopped after the test."""
    yield tmp_path
    for path in tmp_path.glob(".tensorboard-info/pid-*.info"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(path.read_text())["pid"], signal.SIGTERM)


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shown(cell, kind):
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.slow  # CI runs it with Colab's libraries
def test_the_notebook_runs_and_goes_on_where_it_was_stopped(temporary, monkeypatch):
    started = environment(temporary / "cache")
    found = os.pathsep.join([str(ROOT), started["PYTHONPATH"]])
    own = {"TMPDIR": str(temporary), "PYTHONPATH": found, "JUPYTER_PLATFORM_DIRS": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for the command tensorboard
    for name, value in {**started, **own, "PATH": path}.items():
        monkeypatch.setenv(name, value)
    notebook = read()
    cells = {cell.id: cell for cell in notebook.cells}
    stopped = injected(cells["run"].source, tags=["raises-exception"])
    failed = injected(FAILS, tags=["raises-exception"])

    def place(before, *new):
        index = notebook.cells.index(cells[before])
        notebook.cells[index:index] = new

    place("sizes", injected(f'SIZE, RESULTS = "smoke", "{temporary / "runs"}"'))
    place("run", failed, injected(STOPPED), stopped, injected(GOES_ON))
    client = NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()

    assert "jax==" in printed(cells["setup"])
    assert "'platform': 'cpu'" in shown(cells["setup"], "text/plain")[0]
    assert "<iframe" in shown(cells["tensorboard"], "text/html")[0]
    assert (failed.outputs[-1].ename, stopped.outputs[-1].ename) == ("CalledProcessError", "CalledProcessError")
    assert "exit status 2" in failed.outputs[-1].evalue
    assert "exit status 130" in stopped.outputs[-1].evalue
    assert "step 10/60" not in printed(cells["run"])
    assert "step 60/60" in printed(cells["run"])
    assert "run 3 of 3: base 1e6, seed 0" in printed(cells["ablation"])
    for cell, work, heading in (
        ("report", "rope_extrap_smoke", "ntk"),
        ("ablation-report", "rope_base_smoke", "base 1e6"),
    ):
        work = temporary / "runs" / work
        report = (work / "report.md").read_text()
        assert len(shown(cells[cell], "image/png")) == len(list((work / "figures").glob("*.png"))) > 3
        text = "\n".join(shown(cells[cell], "text/markdown"))
        assert re.findall(r"^\|.*$", text, re.MULTILINE) == re.findall(r"^\|.*$", report, re.MULTILINE)
        assert f"| {heading} |" in text
        assert "](figures" not in text
    assert len(list((temporary / "runs" / "rope_base_smoke" / "runs").glob("stack-*"))) == 1
    curves = EventAccumulator(str(temporary / "runs" / "rope_extrap_smoke" / "tensorboard")).Reload()
    assert curves.Tags()["scalars"]


def test_the_notebook_is_kept_without_outputs_and_its_cells_are_named():
    notebook = read()
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id)
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert not re.search(r"""["'( ]/(?!content\b)\w""", cell.source)  # no absolute path of a particular machine


@pytest.mark.parametrize(
    ("runtime", "kept"),
    [
        (
            {"jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.20", "numpy": "2.1.3", "rich": "13.9"},
            "jax jaxlib libtpu numpy",
        ),
        (
            {"jax": "0.7.2", "jax-cuda12-plugin": "0.7.2", "flax": "0.11.2", "jaxtyping": "0.2"},
            "jax jax-cuda12-plugin flax",
        ),
    ],
)
def test_what_it_installs_moves_no_jax(runtime, kept, monkeypatch):
    commands = []

    class Popen(contextlib.nullcontext):
        stdout, returncode = (), 0

        def __init__(self, command, **_):
            super().__init__(self)
            commands.append(command)

    found = [types.SimpleNamespace(name=name, version=version) for name, version in runtime.items()]
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr("importlib.metadata.distributions", lambda: found)
    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout='{"platform": "tpu"}'))
    exec(source("setup"), {})
    (command,) = commands
    pins = [f"{name}=={runtime[name]}" for name in kept.split()]
    quiet = ["--quiet", "--disable-pip-version-check"]
    assert command == [sys.executable, "-m", "pip", "install", *quiet, "-r", "requirements.txt", *pins]


@pytest.mark.parametrize(
    ("device", "sizes"),
    [
        ({"platform": "tpu", "gigabytes": 15.7, "compute_capability": 0.0}, ("small", "default")),  # v5e-1
        ({"platform": "gpu", "gigabytes": 11.8, "compute_capability": 7.5}, ("default", "default")),  # T4
        ({"platform": "gpu", "gigabytes": 17.7, "compute_capability": 8.9}, ("small", "default")),  # L4
        ({"platform": "cpu", "gigabytes": 0.0, "compute_capability": 0.0}, ("default", "smoke")),
    ],
)
def test_sizes_follow_the_device(device, sizes, tmp_path):
    names = {"device": device, "Path": Path}
    exec(source("choices"), names)
    assert not names["DRIVE"]
    exec(source("sizes"), names := names | {"RESULTS": tmp_path / "runs"})
    assert (names["size"], names["ablation_size"]) == sizes
    assert rope_extrap.get_config(f"size={sizes[0]}")


def test_drive_is_mounted_where_it_is_asked_for(monkeypatch):
    mounted, made = [], []
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=drive))
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: made.append(path))
    exec(source("sizes"), {"device": {}, "Path": Path, "SIZE": "smoke", "DRIVE": True})
    assert mounted == ["/content/drive"]
    assert made == [Path("/content/drive/MyDrive/posenc_jax")]


def installed(monkeypatch, names, **changes):
    """Run the setup cell with other values of its names, without an installation. Returns the folder that it enters."""
    process = types.SimpleNamespace(stdout=(), returncode=0)
    monkeypatch.setattr("importlib.metadata.distributions", list)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: contextlib.nullcontext(process))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout='{"platform": "tpu"}'))
    cell = source("setup")
    for name, value in changes.items():
        cell = cell.replace(f'{name} = ""', f"{name} = {value!r}")
    exec(cell, names)
    return Path.cwd()


def test_the_project_is_unpacked_from_an_uploaded_zip_file_or_read_from_a_folder(monkeypatch, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("posenc_jax-main/launch.py", "")
    uploaded = types.SimpleNamespace(upload=lambda: {"posenc_jax.zip": packed.getvalue()})
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=uploaded))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    root = tmp_path / "work" / "posenc_jax" / "posenc_jax-main"
    assert installed(monkeypatch, {}) == root
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delitem(sys.modules, "google.colab")
    assert installed(monkeypatch, {}) == root  # which is not uploaded again
    monkeypatch.chdir(tmp_path)
    assert installed(monkeypatch, {}, FOLDER=str(root)) == root
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="REPOSITORY must be the address"):
        installed(monkeypatch, {})
    with pytest.raises(ValueError, match="FOLDER must be a folder of posenc_jax"):
        installed(monkeypatch, {}, FOLDER=str(tmp_path))
