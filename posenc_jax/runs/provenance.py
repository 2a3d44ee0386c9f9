"""Provenance of a run: command, versions, devices, git revision and text."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from posenc_jax.distributed import hosts
from posenc_jax.runs.program import Program

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "posenc-jax")


def record(program: Program, started: str) -> dict[str, Any]:
    """What the runs of a program are made with, and the windows that they are evaluated on.

    `started` names the start of the command, by its time.
    """
    dataset, devices, found = program.dataset, jax.devices(), program.windows.documents
    place = [f"{hosts.count()} processes"] if hosts.count() > 1 else []
    place += [f"{os.cpu_count()} cores", platform.machine()]
    return {
        "started": started,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": f"{devices[0].device_kind} x{len(devices)} ({', '.join(place)})",
        "git_revision": _git_revision(),
        "parameters": program.parameters,
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "splits": {
                name: {"documents": len(split.names), "tokens": len(split.tokens), "bytes": int(split.num_bytes)}
                for name, split in dataset.splits.items()
            },
        },
        "windows": {
            "asked": program.config.evaluation.windows,
            "found": len(found),
            "documents": len(set(found)),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the code, with "+changes" if files differ from it; None where git does not track the code."""
    code = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(code.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", code.name)  # not so of a package that is installed inside another checkout
        return git("describe", "--always", "--abbrev=12", "--dirty=+changes")
    except (OSError, subprocess.SubprocessError):
        return None
