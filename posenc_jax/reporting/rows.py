"""Rows of measurements as CSV: a frozen dataclass for each kind of row, a column for each of its fields."""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

from posenc_jax.files import replace_text
from posenc_jax.untrusted import DamagedError, printable, read_text

Row = TypeVar("Row")


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Write rows of a dataclass whole or not at all; floats so that `read_rows` gives them back exactly.

    Fields are of type str, int, bool, float, or int or float or None, which is written as an empty text.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_columns(kind))
    for row in rows:
        items = astuple(row)  # type: ignore[arg-type]
        writer.writerow(_escape_formula(item) if isinstance(item, str) else item for item in items)
    replace_text(path, text.getvalue())


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Rows of a dataclass. Raises DamagedError, which names the file and the line."""
    columns, types = _columns(kind), [field.type for field in fields(kind)]  # type: ignore[arg-type]
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header = next(reader, [])
        if header != columns:
            raise DamagedError(f"{path}: columns are {header}, must be {columns}")
        return [kind(*(_PARSE[type_](text) for type_, text in zip(types, line, strict=True))) for line in reader]
    except DamagedError:
        raise
    except (ValueError, KeyError, csv.Error) as error:
        raise DamagedError(f"{path}, line {reader.line_num}: {error}") from None


def _columns(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


def _escape_formula(text: str) -> str:
    """A spreadsheet runs a field that opens with one of these; an apostrophe makes it text, and is itself escaped."""
    text = printable(text)
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "'")) else text


def _integer(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise ValueError(f"{text[:20]!r} is no whole number of at most 18 digits")
    return int(text)


_PARSE: dict[Any, Any] = {
    str: lambda text: text.removeprefix("'"),
    int: lambda text: _integer(text),
    float: float,
    bool: lambda text: {"True": True, "False": False}[text],
    int | None: lambda text: _integer(text) if text else None,
    float | None: lambda text: float(text) if text else None,
}
