"""results.csv and the tables made from it."""

import csv
import math
import os
from dataclasses import fields, replace

import pytest
from rich.console import Console

from posenc_jax.files import replace_text
from posenc_jax.reporting.tables import (
    METRICS,
    Result,
    by_curve,
    escape_markdown,
    extrapolation_table,
    ranked,
    read_results,
    write_results,
)
from tests.reporting.rows import BITS, learned_results, results, row


def column(table, length):
    """The cells in the column of a length, by row name."""
    (index,) = (i for i, name in enumerate(table.header) if name.startswith(f"{length} "))
    return {cells[0].text: cells[index] for cells in table.rows}


def on_screen(table, width=120):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table.rich())
    return capture.get()


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


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    replace_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            replace_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    replace_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert [child.name for child in tmp_path.iterdir()] == ["report.md"]


def test_headers_give_lengths_and_multiples_of_the_training_length():
    table = extrapolation_table(results(), "prefix_bits_per_byte")
    assert table.header == ("scaling", "128 (0.5x)", "256 (1x)", "512 (2x)", "1024 (4x)")


def test_cells_are_values_with_half_the_width_of_their_interval():
    assert column(extrapolation_table(results(), "prefix_bits_per_byte"), 512)["ntk"].text == "1.900 ± 0.010"
    assert column(extrapolation_table(results(), "prefix_perplexity"), 512)["none"].text == "4.00 ± 0.01"
    lopsided = [replace(row(), ci_low=1.5, ci_high=2.1), replace(row(length=1024), ci_low=None, ci_high=None)]
    table = extrapolation_table(lopsided, "prefix_bits_per_byte")
    assert [cell.text for cell in table.rows[0]] == ["rope", "2.000 ± 0.300", "2.000"]


def test_gains_are_signed_and_zero_is_never_negative():
    gains = [row("context_gain_bits_per_byte", 512, 0.02), row("context_gain_bits_per_byte", 1024, -0.0001)]
    (cells,) = extrapolation_table(gains, "context_gain_bits_per_byte").rows
    assert [cell.text for cell in cells[1:]] == ["+0.020 ± 0.010", "+0.000 ± 0.010"]


def test_the_lowest_loss_and_the_highest_gain_are_best():
    for metric in METRICS.keys() & {result.metric for result in results()}:
        best = {name for name, cell in column(extrapolation_table(results(), metric), 512).items() if cell.best}
        assert best == {"ntk"}, metric


def test_equals_at_the_digits_shown_are_all_best():
    at_128 = column(extrapolation_table(results(), "prefix_bits_per_byte"), 128)
    assert [name for name, cell in at_128.items() if cell.best] == ["none", "ntk"]


def test_a_single_value_is_not_the_best_of_anything():
    table = extrapolation_table(learned_results(), "prefix_bits_per_byte")
    assert not any(cell.best for cell in column(table, 1024).values())
    assert column(table, 512)["none"].best


def test_a_length_past_the_table_is_named_so():
    table = extrapolation_table(learned_results(), "prefix_bits_per_byte")
    assert column(table, 1024)["learned"].text == "beyond its table"
    assert "beyond its table" in table.markdown()
    assert "beyond its table" in on_screen(table)


def test_rows_are_named_by_what_differs():
    def names(rows):
        table = extrapolation_table(rows, "prefix_bits_per_byte")
        return table.header[0], [cells[0].text for cells in table.rows]

    assert names(results()) == ("scaling", ["none", "ntk", "linear"])
    assert names(learned_results()) == ("encoding", ["none", "learned"])
    assert names([row()]) == ("encoding", ["rope"])
    assert names([row(), row(scaling="ntk"), row(encoding="alibi")]) == ("encoding", ["rope", "rope ntk", "alibi"])


def test_markdown_and_terminal_show_the_same_cells():
    table = extrapolation_table(results(), "prefix_bits_per_byte")
    lines = table.markdown().splitlines()
    assert lines[:2] == [
        "| scaling | 128 (0.5x) | 256 (1x) | 512 (2x) | 1024 (4x) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    assert lines[3] == "| ntk | **1.850 ± 0.010** | 1.850 ± 0.010 | **1.900 ± 0.010** | **2.160 ± 0.010** |"
    screen = on_screen(table)
    assert "1.900 ± 0.010 *" in screen
    for cells in table.rows:
        assert all(cell.text in screen for cell in cells)


def test_names_are_not_cut_on_a_narrow_terminal():
    assert "yarn:beta_fast=2" in on_screen(
        extrapolation_table(
            [*results(), *(row(length=2**i, scaling="yarn:beta_fast=2") for i in range(7, 12))], "prefix_bits_per_byte"
        ),
        width=80,
    )


def test_names_are_no_markup_on_the_terminal():
    assert "[red]x" in on_screen(extrapolation_table([row(), row(scaling="[red]x")], "prefix_bits_per_byte"))


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("<script>", "&lt;script&gt;"),
        ("`code`", r"\`code\`"),
        ("*bold*", r"\*bold\*"),
        ("_italic_", r"\_italic\_"),
        ("dynamic_ntk", "dynamic_ntk"),
        ("yarn:beta_fast=2", "yarn:beta_fast=2"),
        ("[a](b)", r"\[a\](b)"),
        ("$x$ ~y~ \\", r"\$x\$ \~y\~ \\"),
        ("R&D", "R&amp;D"),
        ("two\nlines", "two lines"),
    ],
)
def test_markdown_shows_text_as_it_is(text, escaped):
    assert escape_markdown(text) == escaped
    line = extrapolation_table([row(), row(scaling=text)], "prefix_bits_per_byte").markdown().splitlines()[3]
    assert line.startswith(f"| {escaped} | ")


def test_two_values_of_one_curve_at_one_length_are_refused():
    with pytest.raises(ValueError, match=r"prefix_bits_per_byte for 'rope' at length 512: .* seed 0, .* seed 1"):
        by_curve([row(), row(seed=1)], "prefix_bits_per_byte")


def test_results_of_several_training_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\[256, 512\]"):
        extrapolation_table([row(), row(length=1024, train_length=512)], "prefix_bits_per_byte")


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
