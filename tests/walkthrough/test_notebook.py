"""The notebook runs, and shows the same content as the command."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "experiments" / "walkthrough.ipynb"


@pytest.mark.slow  # CI runs it with Colab's libraries
def test_the_notebook_runs_and_shows_every_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if {"image/png", "image/gif"} & output.get("data", {}).keys()]
    assert len(pictures) == 9
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "원-핫 (5, 30522) @ W (30522, 512) = (5, 512)" in printed
    assert "10. 로짓에 더하는 다른 방법들" in printed  # the language of the sentence
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_the_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
