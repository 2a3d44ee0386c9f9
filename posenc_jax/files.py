"""Files that are written whole or not at all, checksums, and where damaged files go."""

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

from posenc_jax.untrusted import blaming, check_form, read_json


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path` when the block ends, and is removed when the block raises.

    A reader of `path` sees the old file or the new one. The new file is opened exclusively under a random name in the
    same folder, so that no link that somebody else placed there is followed, and processes that write the same path at
    once do not disturb each other. A process that is killed leaves its new file to `remove_abandoned`.
    """
    temporary, file = _new_file(path)
    held = os.dup(file.fileno())  # keeps the lock until the file has its place
    try:
        with file:
            yield file
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        os.close(held)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left of `replacing` in a folder and the folders in it.

    New files are locked while they are written, by the kernel, so that those of processes that run stay.
    """
    for path in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp")):
        if not re.search(r"[.][0-9a-f]{16}[.]tmp$", path.name):
            continue
        with contextlib.suppress(OSError):  # locked, or gone, or of another user
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _new_file(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, locked where the file system has locks, and its name."""
    while True:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        file = temporary.open("xb")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, file
        file.close()  # another process removed it before it was locked


def in_project(name: str) -> Path:
    """The path of a file as seen from here or, where there is none, from the folder that holds this package."""
    path, own = Path(name), Path(__file__).parent.parent / name
    return own if own.exists() and not path.exists() else path


def replace_text(path: Path, text: str) -> None:
    """Replace a text file, in UTF-8. File names that are not valid UTF-8 keep their bytes, written as "\\udcff"."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def read_regular(path: Path) -> bytes:
    """The content of a regular file, up to its stated size. Files of /proc state 0; reading them may never end.

    Raises OSError, also for pipes, devices and folders.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        return file.read(status.st_size)


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: Any) -> str:
    """The SHA-256 sum of a value that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, content: Any) -> None:
    """Replace a JSON file by this content and its SHA-256 sum."""
    replace_text(path, json.dumps({"content": content, "sha256": sha256_of(content)}, indent=1))


def read_sealed(path: Path, form: Any = object) -> Any:
    """The content that `write_sealed` wrote, checked against a form (see `untrusted.check_form`).

    Raises OSError, and DamagedError, a ValueError, if the file is damaged.
    """
    sealed = read_json(path)
    with blaming(path):
        check_form(sealed, {"content": form, "sha256": str})
        if sealed["sha256"] != sha256_of(sealed["content"]):
            raise ValueError("it is not as it was written")
    return sealed["content"]


def place_aside(path: Path, folder: Path) -> Path:
    """A new name in `folder` for a damaged file or folder. The folder is made if it does not exist."""
    folder.mkdir(exist_ok=True)
    return folder / f"{path.name}-{time.time_ns()}"
