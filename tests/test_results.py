"""Rows are read from CSV exactly as written, grouped into curves, and ranked."""

import csv
import math
from dataclasses import dataclass, fields, replace

import pytest

from posenc_jax.results import Result, by_curve, ranked, read_results, read_rows, write_results, write_rows
from tests.reporting.rows import BITS, results, row


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


def test_results_come_back_exactly(tmp_path):
    rows = [
        row(value=1 / 3, half_width=math.pi),
        row(value=None),
        row(value=-1e-300, half_width=0.1 + 0.2),
        row(value=math.inf),
        replace(row(), ci_low=None, ci_high=None),
    ]
    write_results(tmp_path / "results.csv", rows)
    assert read_results(tmp_path / "results.csv") == rows


def test_columns_are_the_documented_ones(tmp_path):
    write_results(tmp_path / "results.csv", [])
    header = "run,encoding,scaling,seed,train_length,eval_length,metric,value,ci_low,ci_high,tokens\n"
    assert (tmp_path / "results.csv").read_bytes().decode() == header


@pytest.mark.parametrize(
    "name", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\nx", "'=1", "'", 'a,"b"', "a|b", "plain", ""]
)
def test_text_comes_back_and_is_no_formula_to_a_spreadsheet(tmp_path, name):
    rows = [replace(row(value=-1.5), run=name, encoding=name, scaling=name)]
    write_results(tmp_path / "results.csv", rows)
    assert read_results(tmp_path / "results.csv") == rows
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        (written,) = csv.DictReader(file)
    assert not written["run"].startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert written["value"] == "-1.5"


def test_plain_text_is_written_as_it_is(tmp_path):
    write_results(tmp_path / "results.csv", [row(scaling="yarn:beta_fast=2")])
    assert ",yarn:beta_fast=2," in (tmp_path / "results.csv").read_text(encoding="utf-8")


def test_a_damaged_file_is_refused_with_file_and_line(tmp_path):
    path = tmp_path / "results.csv"
    write_results(path, [row(), row(length=1024)])
    good = path.read_text(encoding="utf-8")
    path.write_text(good.replace(",1024,", ",many,"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.csv, line 3: .*many"):
        read_results(path)
    path.write_text(good.replace("eval_length", "length"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.csv: columns are .*'length'"):
        read_results(path)
    path.write_text(good.rsplit(",", 1)[0] + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3"):
        read_results(path)


def test_two_values_of_one_curve_at_one_length_are_refused():
    with pytest.raises(ValueError, match=r"prefix_bits_per_byte for 'rope' at length 512: .* seed 0, .* seed 1"):
        by_curve([row(), row(seed=1)], "prefix_bits_per_byte")


def test_curves_are_sorted_by_length_and_hold_one_metric():
    curves = by_curve(results()[::-1], "context_gain_bits_per_byte")
    assert {name: list(rows) for name, rows in curves.items()} == {name: [512, 1024] for name in BITS}


def test_curves_are_in_the_order_of_the_results():
    assert list(by_curve([row(length=1024), row(length=512, scaling="ntk")], "prefix_bits_per_byte")) == ["none", "ntk"]


def test_what_has_no_value_is_not_ranked():
    order = ranked([row(value=2.0), row(value=math.nan), None, row(value=None), row(value=1.0)], "prefix_bits_per_byte")
    assert [result.value for result in order] == [1.0, 2.0]


def test_every_field_of_a_result_is_read(tmp_path):
    original = row()
    write_results(tmp_path / "a.csv", [original])
    for field in fields(Result):
        value = getattr(original, field.name)
        changed = replace(original, **{field.name: f"{value}!" if isinstance(value, str) else value + 1})
        write_results(tmp_path / "b.csv", [changed])
        assert read_results(tmp_path / "b.csv") == [changed]
