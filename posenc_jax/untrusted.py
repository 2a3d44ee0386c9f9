"""Reads files from untrusted sources: bounded sizes, checked structure, and text printed without control characters."""

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

MAX_BYTES = 1 << 24  # of a JSON text
MAX_ARRAY_BYTES = 1 << 28  # of all arrays in a file
MAX_LOG_BYTES = 1 << 30
MAX_DEPTH = 32  # nesting depth of lists and objects
MAX_NAMES_BYTES = 1 << 22  # of the central directory of a zip file
_END = struct.Struct("<4s4H2LH")  # the end record of a zip file: signature, ..., directory size, ..., comment size
_END_64 = struct.Struct("<4sLQL")  # the record before it, in files larger than 4 GiB


class DamagedError(ValueError):
    """A file does not hold valid content. The message names the file."""

    exit_code = 4


def link_in(folder: Path) -> str | None:
    """Describe the first entry in a folder tree that could redirect a read or write; None if there is none.

    Such an entry is a symbolic or hard link, a named pipe, a device or a socket. The folder itself may be a link.
    """
    folders = [folder]
    while folders:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process has deleted it in the meantime
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
def damaged_if_invalid(path: Path) -> Iterator[None]:
    """Convert the errors that Python raises for values of the wrong type or form into a DamagedError naming `path`."""
    try:
        yield
    except DamagedError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise DamagedError(f"{path} is damaged: {reason}") from error


def read_bytes(path: Path, most_bytes: int = MAX_BYTES) -> bytes:
    """Read a file. Raises OSError, and DamagedError if it is not a regular file or has more than `most_bytes`."""
    with _opened(path, most_bytes) as file:
        return file.read(most_bytes)


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises the errors of `read_bytes`, and DamagedError if the content is not UTF-8."""
    with damaged_if_invalid(path):
        return read_bytes(path).decode()


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises the errors of `read_text`, and DamagedError where `parse_json` raises ValueError."""
    with damaged_if_invalid(path):
        return parse_json(read_text(path))


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text. Raises ValueError if it is not JSON, too long, too deep, or has an integer above 64 bits."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} characters")
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        level = [item for part in level for item in (part.values() if isinstance(part, dict) else part)]
    return value


def check_form(value: Any, form: Any, name: str = "it") -> None:
    """Raise a ValueError that names the offending part if a JSON value does not match a form.

    A form is one of:

    - a type, or types joined by ``|``;
    - a list with one element, the form of every item;
    - a mapping ``{str: form}``, where `form` is the form of every value;
    - a mapping from required keys to the forms of their values. Other keys are allowed.
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


def read_arrays(path: Path, most_bytes: int = MAX_ARRAY_BYTES) -> dict[str, np.ndarray]:
    """Read an .npz file of numbers and strings. At most `most_bytes` are unpacked. Raises OSError and DamagedError."""
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
        except Exception as error:  # zipfile, zlib and numpy raise many kinds of errors for malformed data
            raise DamagedError(f"{path} is damaged: {str(error) or type(error).__name__}") from None


def printable(text: str) -> str:
    """Replace control and formatting characters with escapes such as "\\x1b". Newlines and tabs are kept.

    Characters that control a terminal or change the reading order lose their effect. Some scripts need zero-width
    joiners, which are kept.
    """
    kept = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"

    def shown(character: str) -> str:
        if character.isprintable() or character in kept or unicodedata.category(character) == "Zs":
            return character
        return character.encode("unicode_escape").decode()

    return "".join(map(shown, text))


@contextlib.contextmanager
def _opened(path: Path, most_bytes: int) -> Iterator[BinaryIO]:
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except IsADirectoryError:
        raise DamagedError(f"{path} is damaged: it is a folder") from None
    with file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{path} is damaged: it is not a regular file")
        if found.st_size > most_bytes:
            raise DamagedError(f"{path} is damaged: it has {found.st_size} bytes, more than {most_bytes}")
        yield file


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else None
    if value is None or not -(2**63) <= value < 2**64:
        raise ValueError("it has an integer of more than 64 bits")
    return value


def _check_directory(file: BinaryIO) -> None:
    """Raise DamagedError unless the zip file ends the way numpy writes it and its central directory is small."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - _END.size - _END_64.size))
    marker, end = file.read(_END_64.size), file.read()
    if not end.startswith(b"PK\5\6") or end[-2:] != b"\0\0" or marker.startswith(b"PK\6\7"):
        raise DamagedError("it does not end as an .npz file does")
    if _END.unpack(end)[5] > MAX_NAMES_BYTES:
        raise DamagedError("its directory is too large")


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise DamagedError(f"{entry.filename} has an unsupported format version")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype.kind not in "biufU" or not dtype.itemsize:
            raise DamagedError(f"{entry.filename} has the unsupported dtype {dtype}")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != entry.file_size - member.tell():
            raise DamagedError(f"{entry.filename} has a size that does not match its shape")
        content = member.read()
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_column else "C")
