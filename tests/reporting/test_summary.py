"""The short table of a study, and the table of costs."""

from posenc_jax.reporting.summary import costs_table, read_costs, summary
from tests.reporting.rows import learned_results, row


def test_summary_has_losses_gains_and_costs():
    gains = [row("context_gain_bits_per_byte", length, -0.25, encoding="none") for length in (512, 1024)]
    table = summary([*learned_results(), *gains], {"none": {"parameters_added": "0", "step_time_to_none": "1.0"}})
    assert table.header[1:6] == ("1x", "2x", "4x", "gain 2x", "gain 4x")
    assert table.header[6:] == ("parameters", "step time", "compile (s)")
    texts = [[cell.text for cell in cells] for cells in table.rows]
    assert texts == [
        ["none", "1.900", "1.920", "2.500", "-0.250", "-0.250", "0", "1.0", ""],
        ["learned", "1.850", "2.600", "", "", "", "", "", ""],
    ]


def test_costs_are_read_by_encoding_and_shown_in_order(tmp_path):
    columns = "encoding,length,parameters_added,compile_seconds,step_time_to_none,temporary_mib"
    (tmp_path / "costs.csv").write_text(f"{columns}\nfire,1024,520,6.1,1.35,160\nalibi,1024,0,4.7,1.03,133\n")
    rows = [[cell.text for cell in row] for row in costs_table(read_costs(tmp_path / "costs.csv")).rows]
    assert rows == [["fire", "520", "1.35", "160", "6.1"], ["alibi", "0", "1.03", "133", "4.7"]]


def test_without_costs_the_summary_has_no_columns_for_them():
    assert summary(learned_results(), {}).header[-1] == "gain 4x"
