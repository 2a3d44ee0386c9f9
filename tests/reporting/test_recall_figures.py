"""Heat maps of recall: what each cell says, and the effective length in tables."""

import pytest
from matplotlib.text import Text

from posenc_jax.reporting.recall_figures import recall_figures, recall_grid
from posenc_jax.reporting.tables import extrapolation_table
from posenc_jax.results import Result

DEPTHS = ("0.00", "0.50", "1.00")


def row(scaling, metric, length, value, tokens=5, high=None):
    low = None if high is None else value
    return Result("run", "rope", scaling, 0, 8192, length, metric, value, low, high, tokens)


@pytest.fixture(scope="module")
def results():
    rows = []
    for scaling, past in (("none", 0.0), ("yarn", 0.8)):
        for length, share in ((4096, 1.0), (8192, 0.6), (16384, past), (20000, None)):
            rows.append(row(scaling, "passkey_recall", length, share, 15))
            rows += [row(scaling, f"passkey_recall_at_depth_{depth}", length, share) for depth in DEPTHS]
        rows.append(row(scaling, "effective_length", 16384, 4096.0, high=16384.0 if past else 4096.0))
    return rows


def texts(axes):
    return [text.get_text() for text in axes.findobj(Text) if "/" in text.get_text()]


def test_a_panel_per_rule_counts_right_answers_at_each_length_and_depth(results):
    figure = recall_grid(results, "passkey")
    none, yarn = (axes for axes in figure.axes if axes.get_visible())
    assert (none.get_title("left"), yarn.get_title("left")) == ("none", "yarn")
    assert texts(none) == ["5/5", "3/5", "0/5"] * 3
    assert texts(yarn) == ["5/5", "3/5", "4/5"] * 3
    assert [label.get_text() for label in none.get_xticklabels()] == ["4k", "8k", "16k", "20000"]
    assert [label.get_text() for label in none.get_yticklabels()] == ["0 %", "50 %", "100 %"]
    (line,) = none.get_lines()
    assert line.get_xdata()[0] == 1.5  # between 8192 and 16384


def test_only_tasks_with_depths_have_a_figure(results):
    others = [row("none", "multi_query_recall", 4096, 0.5)]
    assert [name for name, _, _ in recall_figures(results + others)] == ["recall_passkey"]


def test_every_table_has_the_effective_length_if_it_was_measured(results):
    table = extrapolation_table(results, "passkey_recall")
    assert table.header[-1] == "effective length, trained on 8192"
    assert [cells[-1].text for cells in table.rows] == ["4096", "4096 to 16384"]
    without = [row for row in results if row.metric != "effective_length"]
    assert extrapolation_table(without, "passkey_recall").header[-1].startswith("20000")
