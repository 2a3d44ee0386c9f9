"""Prints rows of measurements as they arrive, and writes them as CSV."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def show(rows: Iterable[Row]) -> list[Row]:
    """Print the column names, and then each row as soon as it arrives. Returns all rows."""
    shown: list[Row] = []
    for row in rows:
        shown.append(row)
        first = shown[0]
        widths = [max(len(name), len(str(value)) + 4) for name, value in first.items()]
        for line in (first, first.values()) if len(shown) == 1 else (row.values(),):
            print("  ".join(f"{item!s:{width}}" for item, width in zip(line, widths, strict=True)), flush=True)
    return shown


def write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
