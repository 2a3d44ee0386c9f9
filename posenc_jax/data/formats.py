"""The documents in files and datasets: plain text, JSON Lines, Parquet, compressed files, and Hugging Face datasets.

A file of text is one document, named like the file. Each row of JSON Lines, Parquet or a dataset is one document. Its
name is that of the file, or of the dataset's split, with the number of the row, from 1: `lines.jsonl#17`. For JSON
Lines this is the number of the line. Files of rows are never in memory as a whole.
"""

import codecs
import contextlib
import gzip
import importlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from posenc_jax.data import download
from posenc_jax.errors import one_line, reason
from posenc_jax.files import open_regular, read_regular
from posenc_jax.schema import ConfigError, type_name

PACKED = (".gz", ".zst")
SUFFIXES = (".txt", ".jsonl", ".parquet")  # of the files that are read in a folder; the first two may also be packed
SUFFIXES += tuple(kind + packed for kind in SUFFIXES[:2] for packed in PACKED)
UNREAD = (".7z", ".bz2", ".lz4", ".rar", ".tar", ".tgz", ".xz", ".zip")
UNREAD += (".arrow", ".feather", ".json", ".ndjson", ".npy", ".npz")
HUB = "hf://datasets/"  # begins the name of a dataset of the Hugging Face Hub
_BATCH = 1000  # rows of a dataset that are read at a time

Named = tuple[str, bytes]  # the name and the text of a document


def read_file(path: Path, name: str, field: str) -> Iterator[Named]:
    """The documents of a file, whose text is in the `field` of each row. Raises ConfigError.

    A file with an unknown suffix is text. A byte order mark is removed.
    """
    packed = path.suffix.lower() in PACKED
    kind = Path(path.stem if packed else path.name).suffix.lower()
    if kind in UNREAD or (packed and kind in (*PACKED, ".parquet")):
        allowed = "must be text, .jsonl (a JSON object per line) or .parquet; text and .jsonl may be in .gz or .zst"
        raise ConfigError("config.data.path", str(path), f"{allowed}; {kind}{path.suffix * packed} files are not read")
    readers = {".jsonl": _json_lines, ".parquet": _parquet}
    with _readable(path):
        if kind in readers:
            yield from _documents(readers[kind](path, field), name, field, str(path))
        else:
            yield name, _text(path, packed)


def is_dataset(path: str) -> bool:
    """Whether the path is that of a Hugging Face dataset: a name of the Hub, or a folder of `save_to_disk`."""
    markers = ("dataset_dict.json", "state.json")
    return path.startswith(HUB) or any((Path(path).expanduser() / name).is_file() for name in markers)


def read_dataset(path: str, field: str) -> dict[str, Iterator[Named]]:
    """The documents of each split of a dataset. One that has no splits has the name of its folder.

    `path` is a folder of `save_to_disk`, or hf://datasets/OWNER/NAME, which the library `datasets` downloads into its
    own cache. hf://datasets/OWNER/NAME:CONFIG names one of several configurations. Nothing is downloaded if
    POSENC_OFFLINE=1 is in the environment. Raises ConfigError.
    """
    datasets = _library("datasets", path)
    if path.startswith(HUB):
        found = _from_hub(datasets, path)
    else:
        folder = Path(path).expanduser().resolve()
        with _readable(path):
            found = datasets.load_from_disk(str(folder))
        found = found if isinstance(found, dict) else {folder.name: found}
    return {split: _split_documents(path, split, rows, field) for split, rows in found.items()}


def invalid_byte(text: bytes) -> int | None:
    """The offset of the first byte that is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def _text(path: Path, packed: bool) -> bytes:
    if packed:
        with _opened(path) as file:
            text = file.read()
    else:
        text = read_regular(path)
    invalid = invalid_byte(text)
    if invalid is not None:
        raise ConfigError("config.data.path", str(path), f"must be UTF-8 text, which it is not at byte {invalid}")
    return text.removeprefix(codecs.BOM_UTF8)


def _json_lines(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    """The field of each line, with the number of the line. Blank lines are skipped."""
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                try:
                    row = json.loads(line.decode())
                    if not isinstance(row, dict):
                        raise ValueError(f"it is {type_name(type(row))}")
                except (ValueError, RecursionError) as error:
                    at = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                    problem = f"must have a JSON object in each line; line {number}: {at or one_line(error)}"
                    raise ConfigError("config.data.path", str(path), problem) from error
                _check_field(field, row, f"line {number} of {path}")
                yield number, row[field]


def _parquet(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    parquet = _library("pyarrow.parquet", path)
    with open_regular(path) as file:
        table = parquet.ParquetFile(file, page_checksum_verification=True)
        _check_field(field, table.schema_arrow.names, str(path))
        batches = table.iter_batches(columns=[field])
        yield from enumerate((value for batch in batches for value in batch.column(0).to_pylist()), 1)


def _split_documents(path: str, split: str, rows: Any, field: str) -> Iterator[Named]:
    place = f"split {split} of {path}"
    _check_field(field, rows.column_names, place)
    with _readable(path):
        batches = rows.with_format(None).select_columns(field).iter(_BATCH)
        values = enumerate((value for batch in batches for value in batch[field]), 1)
        yield from _documents(values, split, field, place)


def _from_hub(datasets: Any, path: str) -> dict[str, Any]:
    name, _, config = path.removeprefix(HUB).partition(":")
    datasets.config.HF_HUB_OFFLINE |= download.is_offline()  # the library then reads its cache
    try:
        return datasets.load_dataset(HUB + name, config or None)
    except Exception as error:  # the library raises many kinds
        cause = "POSENC_OFFLINE is set" if download.is_offline() else one_line(error)
        remedy = "get it by other means, and name its files, or the folder of its save_to_disk"
        problem = f"cannot be had from the Hugging Face Hub ({cause}); {remedy}"
        raise ConfigError("config.data.path", path, problem) from error


def _documents(rows: Iterable[tuple[int, Any]], name: str, field: str, place: str) -> Iterator[Named]:
    """Documents from the numbers of rows and the values in their field."""
    for number, value in rows:
        if not isinstance(value, str):
            problem = f"must be a string in each row; it is {type_name(type(value))} in row {number} of {place}"
            raise ConfigError("config.data.field", field, problem)
        try:
            yield f"{name}#{number}", value.encode()
        except UnicodeEncodeError as error:  # JSON can express half of a character
            problem = f"must be text that can be encoded as UTF-8, which it is not in row {number} of {place}"
            raise ConfigError("config.data.field", field, problem) from error


def _check_field(field: str, known: Iterable[str], place: str) -> None:
    known = list(known)
    if field not in known:
        problem = f"must be a field of each row; {place} has: {', '.join(known) or 'none'}"
        raise ConfigError("config.data.field", field, problem, known)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, and unpack it while it is read."""
    with open_regular(path) as file:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            with gzip.open(file) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif suffix == ".zst":
            stream = _library("pyarrow", path).CompressedInputStream(file, "zstd")
            yield io.BufferedReader(stream, 1 << 20)
        else:
            yield file


@contextlib.contextmanager
def _readable(path: object) -> Iterator[None]:
    """Raise ConfigError for what cannot be read."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # gzip, pyarrow and datasets raise many kinds for damaged files
        problem = "does not fit into memory" if isinstance(error, MemoryError) else reason(error)
        raise ConfigError("config.data.path", str(path), f"cannot be read: {problem}") from error


def _library(name: str, path: object) -> Any:
    """An optional library. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        problem = f"needs {package}, of the extra posenc-jax[datasets]: pip install {package}"
        raise ConfigError("config.data.path", str(path), problem) from error
