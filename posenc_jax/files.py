"""Files that are written whole or not at all, and checksums."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path` when the block ends, and is removed when the block raises.

    A reader of `path` sees the old file or the new one. The new file is opened exclusively under a random name in the
    same folder, so that no link that somebody else placed there is followed, and processes that write the same path at
    once do not disturb each other.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def in_project(name: str) -> Path:
    """The path of a file as seen from here or, where there is none, from the folder that holds this package."""
    path, own = Path(name), Path(__file__).parent.parent / name
    return own if own.exists() and not path.exists() else path


def replace_text(path: Path, text: str) -> None:
    """Replace a text file, in UTF-8. File names that are not valid UTF-8 keep their bytes, written as "\\udcff"."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def read_regular(path: Path) -> bytes:
    """The content of a regular file, as many bytes as its size says: none of a file of /proc, which may wait for ever.

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
