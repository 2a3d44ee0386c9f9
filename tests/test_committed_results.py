"""Committed files in experiments/results name the clean revision they were made at, or say they are superseded."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "experiments" / "results"
SUPERSEDED = "**Superseded:** "  # starts a paragraph of report.md that says what is wrong
REPORTED = sorted(path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("report.md"))


def revisions(folder: Path) -> Iterator[tuple[str, str]]:
    """Each file or run, and the git revision that it names, or "" if it names none."""
    report = (folder / "report.md").read_text(encoding="utf-8")
    found = re.findall(r"^- git revision: (.*)$", report, re.MULTILINE) or [""]
    yield from (("report.md", revision) for line in found for revision in line.split("; "))
    if (folder / "config.json").exists():
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        yield from (("config.json", start["git_revision"] or "") for start in record.get("sessions", [record]))
    if (folder / "members.csv").exists():
        with (folder / "members.csv").open(newline="", encoding="utf-8") as file:
            yield from ((row["run"], own) for row in csv.DictReader(file) for own in row["git_revision"].split("; "))


def unclean(folder: Path) -> list[str]:
    """The files and runs that do not name a clean revision."""
    return [f"{run}: {revision or 'none'}" for run, revision in revisions(folder) if not clean(revision)]


def clean(revision: str) -> bool:
    return re.fullmatch("[0-9a-f]{7,40}", revision) is not None


def is_superseded(folder: Path) -> bool:
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    return any(line.startswith(SUPERSEDED) for line in lines)


@pytest.mark.parametrize("name", REPORTED)
def test_results_name_the_clean_revision_that_they_were_made_at_or_are_superseded(name):
    assert is_superseded(RESULTS / name) or unclean(RESULTS / name) == []


@pytest.mark.parametrize("name", REPORTED)
def test_the_list_of_studies_says_which_results_are_superseded(name):
    listed = name.partition("/")[0]  # a folder may hold several runs
    (line,) = re.findall(rf"^\| `results/{listed}` .*$", (RESULTS.parent / "README.md").read_text(), re.MULTILINE)
    assert ("superseded" in line) == is_superseded(RESULTS / name)


@pytest.mark.parametrize("name", REPORTED)
def test_a_report_has_its_discussion_as_it_stands(name):
    discussion = RESULTS / name / "discussion.md"
    if discussion.exists():
        assert discussion.read_text(encoding="utf-8").strip() in (RESULTS / name / "report.md").read_text(
            encoding="utf-8"
        )


def test_runs_of_changed_files_or_without_a_revision_are_named(tmp_path):
    (tmp_path / "report.md").write_text("# A study\n\n- git revision: 98fa81937b0d; a9792b331b30+changes\n")
    (tmp_path / "config.json").write_text('{"git_revision": null}')
    (tmp_path / "members.csv").write_text("run,git_revision\none,98fa81937b0d\ntwo,98fa81937b0d; unknown\n")
    found = ["report.md: a9792b331b30+changes", "config.json: none", "two: unknown"]
    assert unclean(tmp_path) == found
    assert not is_superseded(tmp_path)
    (tmp_path / "report.md").write_text(f"# A study\n\n{SUPERSEDED}it is wrong.\n")
    assert is_superseded(tmp_path)
    assert unclean(tmp_path) == ["report.md: none", *found[1:]]
