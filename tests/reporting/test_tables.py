"""Tables of results, for the terminal and for reports."""

from dataclasses import replace

import pytest
from rich.console import Console

from posenc_jax.reporting.tables import escape_markdown, extrapolation_table
from posenc_jax.results import METRICS
from tests.reporting.rows import learned_results, results, row


def column(table, length):
    """The cells in the column of a length, by row name."""
    (index,) = (i for i, name in enumerate(table.header) if name.startswith(f"{length} "))
    return {cells[0].text: cells[index] for cells in table.rows}


def on_screen(table, width=120, terminal=False):
    console = Console(width=width, force_terminal=terminal, color_system=None)
    with console.capture() as capture:
        table.print(console)
    return capture.get()


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


def test_results_of_several_training_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\[256, 512\]"):
        extrapolation_table([row(), row(length=1024, train_length=512)], "prefix_bits_per_byte")


def wide_table():
    rows = [
        row(metric="context_gain_bits_per_byte", length=2**i, scaling=scaling, value=-0.123 * i)
        for scaling in ("none", "yarn:beta_fast=0.5,beta_slow=0.015625")
        for i in range(6, 16)
    ]
    return extrapolation_table(rows, "context_gain_bits_per_byte")


@pytest.mark.parametrize("width", [80, 60, 40])
def test_numbers_are_never_cut_on_a_narrow_terminal(width):
    shown = on_screen(wide_table(), width, terminal=True)
    assert max(map(len, shown.splitlines())) <= width
    for i in range(6, 16):
        assert f"{-0.123 * i:+.3f}" in shown
        assert f"{2**i}" in shown
    assert "…" not in shown
    assert "±" not in shown
    assert "yarn:beta_fast" in "".join(shown.split())


def test_a_table_that_fits_with_folded_names_keeps_its_intervals():
    rows = [row(scaling=scaling) for scaling in ("none", "yarn:beta_fast=0.5,beta_slow=0.015625")]
    shown = on_screen(extrapolation_table(rows, "prefix_bits_per_byte"), 44, terminal=True)
    assert shown.count("±") == 2
    assert max(map(len, shown.splitlines())) <= 44


def test_a_table_in_a_pipe_has_its_full_width():
    shown = on_screen(wide_table(), 80)
    lines = [line for line in shown.splitlines() if "yarn:beta_fast=0.5,beta_slow=0.015625" in line]
    assert [line.count("±") for line in lines] == [10]
