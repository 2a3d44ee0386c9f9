"""The text of a study's report about its numbers: ranks, their correction, and warnings for few documents."""

from dataclasses import replace

import pytest
from rich.console import Console

from posenc_jax.reporting import study_report
from posenc_jax.reporting.findings import NO_INTERVALS
from posenc_jax.results import Base, MemberRow, Rank, read_rows, write_results, write_rows
from tests.reporting.rows import row

PREFIX = "prefix_bits_per_byte"
RESULTS = [
    row(PREFIX, length, value, encoding=name) for name, value in (("a", 1.5), ("b", 1.6)) for length in (256, 512)
]
RANKS = [Rank(PREFIX, 512, "a", 1.5, 0.0, 0.0, 0.0), Rank(PREFIX, 512, "b", 1.6, 0.1, 0.05, 0.15)]


def members(documents):
    return [MemberRow(name, 0, name, 1, 1.0, None, "cpu", "abc", "jax 1", 64, 57, documents, "") for name in "ab"]


def study(path, results, ranks, documents):
    write_results(path / "results.csv", results)
    write_rows(path / "ranks.csv", Rank, ranks)
    write_rows(path / "members.csv", MemberRow, members(documents))
    write_rows(path / "bases.csv", Base, [])
    text = study_report.write_report(path, "Which?", "python launch.py", {"a": "", "b": ""}, 2).read_text()
    console = Console(width=120)
    with console.capture() as capture:
        study_report.print_summary(path, console)
    return text, capture.get()


def test_what_a_person_says_is_told_without_control_characters(tmp_path):
    study_report.discussion(tmp_path).write_text("Said \x1b[2J, \u202etxet")
    text, _ = study(tmp_path, RESULTS, RANKS, 31)
    assert r"Said \x1b[2J, \u202etxet" in text


def test_curves_are_ranked_by_how_far_they_are_behind_the_best():
    ranks = [Rank(PREFIX, 256, "b", 1.6, 0.0, 0.0, 0.0), Rank(PREFIX, 256, "a", 1.61, 0.01, -0.02, 0.04), *RANKS]
    ranks += [Rank(PREFIX, 256, "short", 1.8, 0.2, None, None)]
    reading, table = study_report.rankings(ranks, RESULTS)
    assert "Bold: not distinguishable from the best." in reading
    assert table.splitlines()[2:] == [
        "| a | **+0.010 ± 0.030** | **best** |",
        "| b | **best** | +0.100 ± 0.050 |",
        "| short | +0.200 |  |",
    ]


def test_from_one_document_there_is_no_order(tmp_path):
    results = [replace(result, ci_low=None, ci_high=None) for result in RESULTS]
    results += [replace(row("context_gain_bits_per_byte", encoding="a"), ci_low=None, ci_high=None)]
    ranks = [RANKS[0], replace(RANKS[1], ci_low=None, ci_high=None)]
    text, summary = study(tmp_path, results, ranks, 1)
    assert read_rows(tmp_path / "ranks.csv", Rank) == ranks
    said = text.split("## What the numbers say")[1].split("## Tables")[0]
    assert NO_INTERVALS in said
    assert "64 windows asked for, 57 found, from 1 document." in text
    assert "nothing can be said about other texts" in summary
    for verdict in ("behind", "distinguishable", "uses it", "breaks", "survives"):
        assert verdict not in said


@pytest.mark.parametrize(("documents", "warned"), [(9, True), (10, False)])
def test_of_few_documents_the_report_and_the_terminal_warn(tmp_path, documents, warned):
    for text in study(tmp_path, RESULTS, RANKS, documents):
        assert ("so few documents" in text) == warned
    assert (
        f"64 windows asked for, 57 found, from {documents} documents." in study(tmp_path, RESULTS, RANKS, documents)[0]
    )
