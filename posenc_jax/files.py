"""Atomic file writes, checksums, and names for damaged files that are moved aside."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from posenc_jax.untrusted import check_form, damaged_if_invalid, read_json


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the block ends. The new file is removed if the block raises.

    A reader of `path` sees either the complete old file or the complete new one. The new file gets a random name in
    the same folder and is created exclusively. A link that somebody else placed there is therefore never followed, and
    processes that write the same path at the same time do not disturb each other. If the process is killed, the new
    file stays until `remove_abandoned` deletes it.
    """
    temporary, file = _new_file(path)
    held = os.dup(file.fileno())  # keeps the lock until the file is renamed
    try:
        with file:
            yield file
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        os.close(held)


def remove_abandoned(folder: Path) -> None:
    """Delete the temporary files that killed processes left behind, in a folder and its direct subfolders.

    Files of running processes are kept: `atomic_write` holds a lock, which the kernel releases when the process dies.
    """
    for path in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp")):
        if not re.search(r"[.][0-9a-f]{16}[.]tmp$", path.name):
            continue
        with contextlib.suppress(OSError):  # locked, already deleted, or owned by another user
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _new_file(path: Path) -> tuple[Path, BinaryIO]:
    """Create a file next to `path` and return its name and handle. It is locked if the file system supports locks."""
    while True:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        file = temporary.open("xb")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, file
        file.close()  # another process deleted it before it was locked


def in_project(name: str) -> Path:
    """The path relative to the working directory or, if no file exists there, to the folder that holds this package."""
    path, own = Path(name), Path(__file__).parent.parent / name
    return own if own.exists() and not path.exists() else path


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a text file, encoded as UTF-8. Bytes of file names that are not valid UTF-8 are written as "\\udcff"."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, also for pipes, devices and folders."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return file


def read_regular(path: Path) -> bytes:
    """Read a regular file, up to the size that the file system reports. Raises the errors of `open_regular`.

    Reading a file in /proc, of reported size 0, may never finish.
    """
    with open_regular(path) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: Any) -> str:
    """The SHA-256 checksum of a JSON-serializable value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, content: Any) -> None:
    """Replace a JSON file with this content and its SHA-256 checksum."""
    atomic_write_text(path, json.dumps({"content": content, "sha256": sha256_of(content)}, indent=1))


def read_sealed(path: Path, form: Any = object) -> Any:
    """Read what `write_sealed` wrote, if it has the form (`untrusted.check_form`). Raises OSError and DamagedError."""
    sealed = read_json(path)
    with damaged_if_invalid(path):
        check_form(sealed, {"content": form, "sha256": str})
        if sealed["sha256"] != sha256_of(sealed["content"]):
            raise ValueError("its checksum does not match its content")
    return sealed["content"]


def place_aside(path: Path, folder: Path) -> Path:
    """A new path in `folder` for a damaged file or folder. `folder` is created if it does not exist."""
    folder.mkdir(exist_ok=True)
    return folder / f"{path.name}-{time.time_ns()}"
