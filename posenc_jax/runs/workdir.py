"""The workdir of a run: its lock, its record config.json, and whether the run is complete."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from posenc_jax import encodings
from posenc_jax.config import RunConfig
from posenc_jax.distributed import hosts
from posenc_jax.files import atomic_write_text, read_sealed, remove_abandoned, sha256, write_sealed
from posenc_jax.identity import ADDED, RESUMABLE
from posenc_jax.model_config import RECURRENT
from posenc_jax.schema import changes, plain
from posenc_jax.untrusted import check_form, damaged_if_invalid, link_in, read_json

FORMAT = 10  # 10: settings of retrieval tasks and of LongPPL
COMPLETE = "complete.json"  # written last: the final step, and checksums of the results
RESULTS = ("windows.npz", "results.csv")
OF_A_START = ("started", "command", "versions", "device", "git_revision")
START = {"started": str, "versions": {str: str | None}, "device": str, "git_revision": str | None}
START |= {"step": int, "total_steps": int, "changed": dict}
WINDOWS = {"asked": int, "found": int, "documents": int}
RECORD = {"format": int, "config": dict, "data": {"fingerprint": str}, "windows": WINDOWS, "sessions": [START]}


class WorkdirError(Exception):
    """The workdir is in use, or belongs to another run."""

    exit_code = 4


def check(path: Path, config: RunConfig) -> None:
    """Raise WorkdirError if this run can neither start nor continue in the folder. Nothing is written."""
    try:
        if not path.exists():
            return
    except OSError as error:  # for example, the name is too long
        raise WorkdirError(f"workdir {path} cannot be read: {error.strerror}") from error
    if not path.is_dir():
        raise WorkdirError(f"workdir {path} is a file, not a folder")
    refuse_links(path)
    if not (path / "config.json").exists():
        remove_abandoned(path)
        if any(child.name != "lock" for child in path.iterdir()):
            raise WorkdirError(f"workdir {path} holds files but no config.json, so it is no run's; choose another")
        return
    changed = changes(read(path)["config"], plain(config)).items()
    free = {*RESUMABLE, *config.located}
    if other := [f"{field}: {old!r} -> {new!r}" for field, (old, new) in changed if field not in free]:
        raise WorkdirError(f"workdir {path} belongs to another config:\n  " + "\n  ".join(other))


def ending(path: Path, config: RunConfig) -> dict[str, Any] | None:
    """The final step of a complete run, and checksums of its results; None otherwise. Raises ValueError for damage."""
    if not (path / COMPLETE).exists() or changes(read(path)["config"], plain(config)).keys() - config.located:
        return None
    ended = read_sealed(path / COMPLETE, {"step": int, "files": dict.fromkeys(RESULTS, str)})
    return ended | {"files": {name: ended["files"][name] for name in RESULTS}}  # names of other files are ignored


def lost_files(path: Path, sums: dict[str, str]) -> list[str]:
    """The names of files that are missing or do not match their checksums."""
    return [name for name, own in sums.items() if not (path / name).is_file() or sha256(path / name) != own]


def mark_complete(path: Path, step: int) -> None:
    """Write complete.json: the final step, and the checksums of the results."""
    write_sealed(path / COMPLETE, {"step": step, "files": {name: sha256(path / name) for name in RESULTS}})


def read(path: Path) -> dict[str, Any]:
    """The record of a run: resolved config, versions, device, data, and its `sessions`. Raises WorkdirError.

    Settings that were added after the run was recorded have the values that it had.
    """
    try:
        record = read_json(path / "config.json")
        with damaged_if_invalid(path / "config.json"):
            check_form(record, {"format": int, "config": dict})
            if record["format"] == FORMAT:
                check_form(record, RECORD)
                for field, value in ADDED.items():
                    section, _, name = field.partition(".")
                    own = record["config"].setdefault(section, {})
                    if isinstance(own, dict) and _has(section, own, name):
                        own.setdefault(name, value)
    except ValueError as error:
        raise WorkdirError(str(error)) from None
    if record["format"] != FORMAT:
        raise WorkdirError(f"workdir {path} has format {record['format']}, of another release of posenc_jax")
    return record


def _has(section: str, settings: dict[str, Any], name: str) -> bool:
    """Whether a section with these settings has one of this name: kinds of models and encodings have their own."""
    if section == "model":
        return settings.get("architecture") not in RECURRENT
    if section == "encoding":
        encoding = settings.get("name")
        return encoding in encodings.names() and name in encodings.load(encoding).Config.__dataclass_fields__
    return True


def refuse_links(path: Path) -> None:
    """Raise WorkdirError if a folder holds a link or a special file. Writing to it could change files elsewhere."""
    if found := link_in(path):
        raise WorkdirError(f"workdir {path} holds {found}; a workdir must hold only folders and files of its own")


@contextlib.contextmanager
def claim(
    path: Path, config: RunConfig, record: dict[str, Any], check_more: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Lock the folder until the block ends. A new folder gets its config.json, made of `record` and the config.

    `check_more` may raise an error before an existing folder is changed. Process 0 locks the folder for all processes.
    Raises WorkdirError.
    """

    def checked() -> None:
        check(path, config)
        if (path / "config.json").exists():
            check_same_text({str(path): read(path), "this machine": record})
            check_more()

    with contextlib.ExitStack() as held:

        def take() -> None:
            held.enter_context(lock(path, before=checked))
            if not (path / "config.json").exists():
                _write(path, config, record, [])

        hosts.on_leader(take)
        yield


def check_same_text(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise WorkdirError if the records of runs, by name, have different texts."""
    (first, expected), *others = records.items()
    for name, record in others:
        if record["data"]["fingerprint"] != expected["data"]["fingerprint"]:
            texts = f"{first} has fingerprint {_text(expected)}, {name} has {_text(record)}"
            raise WorkdirError(f"the text has changed, so that what was measured cannot be compared: {texts}")


def _text(record: Mapping[str, Any]) -> str:
    return f"{record['data']['fingerprint']} (Python {record['versions']['python']})"


def record_session(path: Path, config: RunConfig, record: dict[str, Any], facts: dict[str, Any]) -> None:
    """Remove complete.json, and record the session that starts now in config.json, unless it already is there.

    Its entry in `sessions` has `facts`, those of `record`, and the changed settings.
    """
    (path / COMPLETE).unlink(missing_ok=True)
    old = read(path)
    sessions = old["sessions"]
    if not sessions or sessions[-1]["started"] != record["started"]:
        own = {field: record[field] for field in OF_A_START}
        sessions = [*sessions, {**own, **facts, "changed": changes(old["config"], plain(config))}]
    _write(path, config, record, sessions)


def _write(path: Path, config: RunConfig, record: dict[str, Any], sessions: list[dict[str, Any]]) -> None:
    entry = {"format": FORMAT, **record, "config": plain(config), "sessions": sessions}
    atomic_write_text(path / "config.json", json.dumps(entry, indent=1) + "\n")


@contextlib.contextmanager
def lock(
    path: Path, *, wait: bool = False, shared: bool = False, before: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Lock the folder until the block ends. Creates the folder if needed. `wait` waits until the lock is free.

    Several processes can hold a `shared` lock at the same time. `before` is called after the lock is taken, and before
    the owner is written into the folder. The kernel releases the lock when the process dies. Raises WorkdirError.
    """
    refuse_links(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", errors="replace")
    except OSError as error:
        raise WorkdirError(f"workdir {path} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise WorkdirError(f"workdir {path} is in use by {file.read(200).strip()}") from None
        before()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        remove_abandoned(path)
        yield
