"""Weights & Biases without a network: a fixture that turns it off, and a reader of the files that it writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb


@pytest.fixture
def offline(tmp_path_factory, monkeypatch):
    """Make wandb write files instead of sending anything, and keep its own files in a temporary folder."""
    folder = tmp_path_factory.mktemp("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(folder))
    wandb.teardown()  # so that it reads the environment again
    yield
    wandb.teardown()


def records(workdir: Path) -> list[list[dict[str, Any]]]:
    """The records of each start of a run, in order, read by wandb's own command."""
    found = []
    for path in sorted(workdir.glob("wandb/*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append([json.loads(line) for line in ran.stdout.splitlines()])
    return found


def points(started: list[dict[str, Any]], tag: str, axis: str = "step") -> list[tuple[int, Any]]:
    """The points of a curve among the records of a start."""
    items = [record["history"]["item"] for record in started if record["type"] == "history"]
    return [(item[axis], item[tag]) for item in items if tag in item]


def settings(started: list[dict[str, Any]]) -> dict[str, Any]:
    """The name, the group, the id and the config that a start gives its run."""
    (run,) = (record["run"] for record in started if record["type"] == "run")
    return run
