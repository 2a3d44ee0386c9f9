"""Measurements as CSV: a frozen dataclass for each kind of row, a column for each of its fields."""

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

from posenc_jax.reporting.tables import replace_text

Row = TypeVar("Row")


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write one or more rows of one dataclass whole or not at all; floats so that `read_rows` gives them back exactly.

    Fields are of type str, int, bool, float or float | None, which is written as an empty text.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(rows[0]))
    writer.writerows(astuple(row) for row in rows)
    replace_text(path, text.getvalue())


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Rows of a dataclass. Raises ValueError, naming the file and line, for a row that is not of that form."""
    own: Any = kind
    names = [field.name for field in fields(own)]
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != names:
            raise ValueError(f"{path}: columns are {header}, must be {names}")
        rows = []
        for line in reader:
            try:
                items = [_PARSE[field.type](text) for field, text in zip(fields(own), line, strict=True)]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
            rows.append(kind(*items))
    return rows


_PARSE: dict[Any, Any] = {
    str: str,
    int: int,
    float: float,
    bool: lambda text: {"True": True, "False": False}[text],
    float | None: lambda text: float(text) if text else None,
}
