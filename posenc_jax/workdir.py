"""The folder a run leaves its results in: who owns it, what run it belongs to, and whether that run is complete."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posenc_jax import hosts
from posenc_jax.config import RunConfig, differences
from posenc_jax.files import replace_text
from posenc_jax.schema import plain

FORMAT = 7


class WorkdirError(Exception):
    """The workdir is in use, or belongs to another run."""

    exit_code = 4


def default(config: RunConfig) -> Path:
    """The folder of a run whose command names none: settings that differ give another folder."""
    return Path("runs") / f"{config.name}-{config.label}-{config.fingerprint}"


def check(path: Path, config: RunConfig) -> None:
    """Raise WorkdirError if the folder cannot be, or continue, this run; nothing is written."""
    try:
        if not path.exists():
            return
    except OSError as error:  # as of a name too long
        raise WorkdirError(f"workdir {path} cannot be read: {error.strerror}") from error
    if not path.is_dir():
        raise WorkdirError(f"workdir {path} is a file, not a folder")
    if not (path / "config.json").exists():
        if any(child.name != "lock" for child in path.iterdir()):
            raise WorkdirError(f"workdir {path} holds files but no config.json, so it is no run's; choose another")
        return
    old = read(path)
    if old.get("format") != FORMAT:
        raise WorkdirError(f"workdir {path} has format {old.get('format')}, of another release of posenc_jax")
    changed = list(differences(old["config"], plain(config)))
    if changed:
        raise WorkdirError(f"workdir {path} belongs to another config:\n  " + "\n  ".join(changed))


def is_complete(path: Path, config: RunConfig) -> bool:
    """Whether the run has ended with the settings asked for: its report is the last thing it writes."""
    return (path / "report.md").exists() and read(path)["config"] == plain(config)


def read(path: Path) -> dict[str, Any]:
    """The record of a run: resolved config, versions, device, data."""
    try:
        record = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WorkdirError(f"{path / 'config.json'} is damaged: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict) or "data" not in record:
        raise WorkdirError(f"{path / 'config.json'} is damaged: it is no record of a run")
    return record


@contextmanager
def claim(path: Path, config: RunConfig, record: dict[str, Any]) -> Iterator[None]:
    """Own the folder until the block ends, with `record` and the config in its config.json. Raises WorkdirError.

    Of many processes the first one owns it, for all.
    """
    with contextlib.ExitStack() as held:
        hosts.decided(lambda: held.enter_context(_claimed(path, config, record)))
        yield


@contextmanager
def _claimed(path: Path, config: RunConfig, record: dict[str, Any]) -> Iterator[None]:
    with lock(path):
        check(path, config)
        if (path / "config.json").exists() and read(path)["data"]["fingerprint"] != record["data"]["fingerprint"]:
            raise WorkdirError(f"the text that workdir {path} was trained on has changed")
        entry = {"format": FORMAT, **record, "config": plain(config)}
        replace_text(path / "config.json", json.dumps(entry, indent=1) + "\n")
        yield


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Own the folder, made if need be, until the block ends; once nobody else does, with `wait`.

    The lock is the kernel's, so that of a process that died is gone. Raises WorkdirError.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / "lock").open("a+")
    except OSError as error:
        raise WorkdirError(f"workdir {path} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise WorkdirError(f"workdir {path} is in use by {file.read().strip()}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield
