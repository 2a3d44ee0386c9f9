"""Rows of measurements as CSV: a frozen dataclass for each kind of row, a column for each of its fields."""

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

from posenc_jax.files import replace_text

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
    """Rows of a dataclass. Raises ValueError, naming the file and line, for a row that is not of that form."""
    columns, types = _columns(kind), [field.type for field in fields(kind)]  # type: ignore[arg-type]
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != columns:
            raise ValueError(f"{path}: columns are {header}, must be {columns}")
        rows = []
        for line in reader:
            try:
                rows.append(kind(*(_PARSE[type_](text) for type_, text in zip(types, line, strict=True))))
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def _columns(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


def _escape_formula(text: str) -> str:
    """A spreadsheet runs a field that opens with one of these; an apostrophe makes it text, and is itself escaped."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "'")) else text


_PARSE: dict[Any, Any] = {
    str: lambda text: text.removeprefix("'"),
    int: int,
    float: float,
    bool: lambda text: {"True": True, "False": False}[text],
    int | None: lambda text: int(text) if text else None,
    float | None: lambda text: float(text) if text else None,
}
