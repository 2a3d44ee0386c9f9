"""Names of runs, variants and folders are shown unchanged everywhere, and are never interpreted as markup."""

import csv
import re
from dataclasses import replace
from html import unescape

import pytest
from rich.console import Console

from posenc_jax import catalogue
from posenc_jax.reporting import figures, report, study_report
from posenc_jax.results import Base, MemberRow, Rank, write_results, write_rows
from tests.reporting import test_report
from tests.reporting.rows import row

NAMES = (
    "_hidden",
    "a|b",
    "[text](https://example.org)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    r"$\frac{1}{$",
    "=1+1",
    "@SUM(A1)",
    "[red]bold[/red]",
    "**b** _i_ `c` ~~d~~",
    "&lt;b&gt;",
    "![picture](file:///etc/passwd)",
    "-->",
)


@pytest.fixture
def study(tmp_path):
    """The folder of a study without its report, with one variant for each name."""
    rows = [
        replace(row(metric, length, 2.0 + i / 10), encoding=name, seed=None)
        for i, name in enumerate(NAMES)
        for length in (256, 512)
        for metric in ("prefix_bits_per_byte", "context_gain_bits_per_byte")
    ]
    write_results(tmp_path / "results.csv", rows)
    ranks = [Rank("prefix_bits_per_byte", 512, name, 2.0, 0.1, 0.05, 0.15) for name in NAMES]
    write_rows(tmp_path / "ranks.csv", Rank, ranks)
    write_rows(tmp_path / "bases.csv", Base, [])
    members = [MemberRow(name, 0, name, 1, 1.0, None, name, name, name, 64, 64, 30, name) for name in NAMES]
    write_rows(tmp_path / "members.csv", MemberRow, members)
    return tmp_path


def written(workdir, command="python launch.py", groups=None):
    groups = groups or dict.fromkeys(NAMES, "all")
    return study_report.write_report(workdir, "Which?", command, groups, len(NAMES)).read_text(encoding="utf-8")


def unescaped(markdown):
    """The text that a reader of rendered Markdown sees, with bold markers and table cells."""
    return unescape(re.sub(r"\\([^A-Za-z0-9\s])", r"\1", markdown))


def test_a_report_of_a_study_shows_names_and_runs_nothing(study):
    text = written(study)
    assert not re.search(r"<[a-z!/]", text, re.IGNORECASE)
    outside = text.split("## Figures")[0] + text.split("## Runs")[1]
    assert not re.search(r"(?<!\\)\]\(|(?<!\\)`|(?<!\\)\$|(?<!\\)~", outside)
    for line in (line for line in text.splitlines() if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 5, 7), line
    for name in NAMES:
        assert unescaped(text).count(name) >= 4, name


def test_figures_label_every_curve_by_its_name_as_text(study):
    rows = study_report.read_results(study / "results.csv")
    for figure in (figures.extrapolation_curve(rows), figures.extrapolation_curve(rows, "context_gain_bits_per_byte")):
        labels = [text for axes in figure.axes for text in axes.texts if text.get_text() != "training length"]
        shown = {"".join(text.get_text().split()) for text in labels}  # long labels have several lines
        assert shown == {"".join(name.split()) for name in NAMES}
        assert not any(text.get_parse_math() for text in labels)
    panels = figures.extrapolation_panels(dict.fromkeys(NAMES[:6], rows))
    assert set(NAMES[:6]) <= {axes.get_title("left") for axes in panels.axes}
    figures.save(panels, study / "panels")
    picture = (study / "panels.svg").read_text(encoding="utf-8")
    assert "<script>" not in picture
    assert "<img" not in picture


def test_tables_for_spreadsheets_hold_no_formula(study):
    for name in ("results.csv", "members.csv", "ranks.csv"):
        with (study / name).open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                for cell in line.values():
                    assert not cell.startswith(("=", "@", "+", "\t", "\r")), cell
                    assert not cell.startswith("-") or float(cell) < 0, cell


def test_the_summary_shows_names_as_they_are(study):
    console = Console(width=400)
    with console.capture() as capture:
        study_report.print_summary(study, console)
    for name in NAMES:
        assert name in capture.get()


def test_the_command_stays_within_its_block(study, tmp_path):
    command = "python launch.py --config.data.path='a\n\n<script>\n# b\r## c\u2028'"
    text = written(study, command)
    block = text.split("## How it was made\n\n")[1].split("\n\n- device")[0]
    assert block.startswith("    python")
    for line in block.splitlines():
        assert not line.strip() or line.startswith("    "), line
    record = {**test_report.RECORD, "command": command}
    other = tmp_path / "run"
    other.mkdir()
    own = test_report.text_of(test_report.make_workdir(other, test_report.results(), record))
    assert (
        r"""    <script>
    # b\r## c\u2028"""
        in own
    )
    assert not re.search(r"^<script>", own, re.MULTILINE)


def test_a_name_of_data_that_is_no_utf_8_can_be_reported(tmp_path):
    record = {**test_report.RECORD, "data": {**test_report.RECORD["data"], "name": "caf\udce9"}}
    path = report.write_report(test_report.make_workdir(tmp_path, test_report.results(), record))
    assert r"caf\\udce9" in path.read_text(encoding="utf-8")


def test_the_path_of_a_picture_is_no_markup(tmp_path, capsys):
    folder = tmp_path / "[red]"
    folder.mkdir()
    catalogue.main(["none", f"--output={folder / 'none.png'}"])
    assert "[red]/none.png" in "".join(capsys.readouterr().out.split())
