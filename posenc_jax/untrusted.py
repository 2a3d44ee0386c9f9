"""Files that anybody may have made: read within bounds, checked for their form, shown without control characters."""

import contextlib
import json
import math
import os
import stat
import struct
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MOST_BYTES = 1 << 24  # of a JSON text
MOST_ARRAY_BYTES = 1 << 28  # of all arrays of a file
MOST_LOG_BYTES = 1 << 30
MOST_DEPTH = 32  # of lists and objects in each other
MOST_NAMES_BYTES = 1 << 22  # of the directory of a zip file
_END = struct.Struct("<4s4H2LH")  # the end of a zip file: signature, ..., size of its directory, ..., size of a comment
_END_64 = struct.Struct("<4sLQL")  # before it, in files of more than 4 GiB


class DamagedError(ValueError):
    """A file does not hold what it should; the message names it."""

    exit_code = 4


def link_in(folder: Path) -> str | None:
    """The first thing in a folder, or below, that could lead a write or a read elsewhere, in words; None if none could.

    That is a symbolic link, a file with several names (hard links), a named pipe, a device or a socket. The folder
    itself may be a link.
    """
    folders = [folder]
    while folders:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process has removed it since
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode):
                        folders.append(Path(entry.path))
                    elif stat.S_ISLNK(found.st_mode):
                        return f"the symbolic link {entry.path}"
                    elif not stat.S_ISREG(found.st_mode):
                        return f"the special file {entry.path}"
                    elif found.st_nlink > 1:
                        return f"{entry.path}, a file that also has another name (a hard link)"
    return None


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turns what Python raises for a value of another type or form into DamagedError for the file that it came from."""
    try:
        yield
    except DamagedError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise DamagedError(f"{path} is damaged: {reason}") from error


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a file. Raises OSError, and DamagedError if it is no file or larger."""
    with _opened(path, most_bytes) as file:
        return file.read(most_bytes)


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """The content of a file in UTF-8. Raises as `read_bytes` does, and DamagedError if it is not UTF-8."""
    with blaming(path):
        return read_bytes(path, most_bytes).decode()


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The value in a JSON file. Raises as `read_text` does, and DamagedError as of `parse_json`."""
    with blaming(path):
        return parse_json(read_text(path, most_bytes))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for no JSON, a depth above MOST_DEPTH, or integers above 64 bits."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} characters")
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        level = [item for part in level for item in _items(part)]
    return value


def check_form(value: Any, form: Any, name: str = "it") -> None:
    """Raise ValueError, naming the part, unless a JSON value has a form.

    A form is a type, or types joined by ``|``; a list of the form of all items; a mapping of `str` to the form of all
    values; or a mapping from names that must be there, beside which there may be others, to their forms.
    """
    if isinstance(form, list):
        check_form(value, list, name)
        for i, item in enumerate(value):
            check_form(item, form[0], f"{name}[{i}]")
    elif isinstance(form, Mapping):
        check_form(value, dict, name)
        for key in value if str in form else form:
            if key not in value:
                raise ValueError(f"{name} has no {key!r}")
            check_form(value[key], form[str] if str in form else form[key], f"{name}.{key}")
    elif not isinstance(value, form) or (isinstance(value, bool) and form is int):
        kind = getattr(form, "__name__", str(form))
        raise ValueError(f"{name} must be of type {kind}, not {type(value).__name__}")


def read_arrays(path: Path, most_bytes: int = MOST_ARRAY_BYTES) -> dict[str, np.ndarray]:
    """The arrays of numbers and texts of an .npz file.

    No more than `most_bytes` are unpacked, whatever its headers say. Raises OSError and DamagedError.
    """
    with _opened(path, most_bytes) as file:
        try:
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
                if size > most_bytes:
                    raise DamagedError(f"it holds {size} bytes, more than {most_bytes}")
                return {entry.filename.removesuffix(".npy"): _array(archive, entry) for entry in archive.infolist()}
        except MemoryError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise many kinds for bytes that are not theirs
            raise DamagedError(f"{path} is damaged: {str(error) or type(error).__name__}") from None


def printable(text: str) -> str:
    """The text, with control and formatting characters, line ends and tabs apart, written as escapes such as "\\x1b".

    Those that steer a terminal or change the order in which text is read (bidirectional overrides) thus lose their
    effect. Joiners of letters stay, as some scripts need them.
    """
    return "".join(character if _is_shown(character) else _escaped(character) for character in text)


def _is_shown(character: str) -> bool:
    if character.isprintable() or character in "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}":
        return True
    return unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


@contextlib.contextmanager
def _opened(path: Path, most_bytes: int) -> Iterator[BinaryIO]:
    try:
        # A named pipe would otherwise be waited for.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except IsADirectoryError:
        raise DamagedError(f"{path} is damaged: it is a folder") from None
    with file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{path} is damaged: it is no regular file")
        if found.st_size > most_bytes:
            raise DamagedError(f"{path} is damaged: it has {found.st_size} bytes, more than {most_bytes}")
        yield file


def _items(part: dict[str, Any] | list[Any]) -> Any:
    return part.values() if isinstance(part, dict) else part


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else None
    if value is None or not -(2**63) <= value < 2**64:
        raise ValueError("it has a whole number of more than 64 bits")
    return value


def _check_directory(file: BinaryIO) -> None:
    """Raise DamagedError unless the zip file ends as numpy writes it, with a directory that is small enough to read."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - _END.size - _END_64.size))
    marker, end = file.read(_END_64.size), file.read()
    if not end.startswith(b"PK\5\6") or end[-2:] != b"\0\0" or marker.startswith(b"PK\6\7"):
        raise DamagedError("it does not end as an .npz file does")
    if _END.unpack(end)[5] > MOST_NAMES_BYTES:
        raise DamagedError("its directory is too large")


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise DamagedError(f"{entry.filename} is of another format")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype.kind not in "biufU" or not dtype.itemsize:
            raise DamagedError(f"{entry.filename} has the type {dtype}")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != entry.file_size - member.tell():
            raise DamagedError(f"{entry.filename} has another size than its shape")
        content = member.read()
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_column else "C")
