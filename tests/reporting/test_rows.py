"""Rows of any frozen dataclass are read from CSV exactly as written."""

from dataclasses import dataclass

import pytest

from posenc_jax.reporting.rows import read_rows, write_rows


@dataclass(frozen=True)
class Row:
    name: str
    count: int
    value: float
    low: float | None
    trained: bool


ROWS = [Row("a, b", 3, 1 / 3, None, True), Row("c", 0, 1e-300, 0.1, False)]


def test_rows_come_back_exactly(tmp_path):
    write_rows(tmp_path / "rows.csv", Row, ROWS)
    assert read_rows(tmp_path / "rows.csv", Row) == ROWS


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("count", "number", "columns are"), (",3,", ",x,", "line 2"), ("False", "false", "line 3")],
)
def test_a_file_of_another_form_is_refused_by_name(tmp_path, old, new, message):
    path = tmp_path / "rows.csv"
    write_rows(path, Row, ROWS)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"rows.csv.*{message}"):
        read_rows(path, Row)
