"""The report of a study (report.md) with figures and TensorBoard curves, and its summary on the terminal."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from posenc_jax.reporting import base_figures, figures, report, task_report
from posenc_jax.reporting.findings import bold, without_intervals
from posenc_jax.reporting.findings import findings as all_findings
from posenc_jax.reporting.recall_figures import recall_figures
from posenc_jax.reporting.report import COPY_METRIC, MAIN_METRIC, Evidence
from posenc_jax.reporting.summary import READING, SHORT_COSTS_READING, Costs, costs_table, read_costs, summary
from posenc_jax.reporting.tables import Cell, Table, escape_markdown, text_table
from posenc_jax.reporting.tensorboard import TensorBoard, extrapolation_curves
from posenc_jax.results import (
    METRICS,
    Base,
    MemberRow,
    Rank,
    Result,
    by_curve,
    curve_names,
    read_results,
    read_rows,
    train_length,
)
from posenc_jax.untrusted import printable, read_text

BASE_FIGURES = {  # metric: file and caption
    MAIN_METRIC: ("base_loss", "Loss of each base at each length, and what theory says"),
    COPY_METRIC: ("base_copy_gain", "What each base finds again at each distance, and what theory says"),
}
COST_CAPTION = "Loss against the time of a training step, at the training length and past it"
COSTS_INTRODUCTION = (
    "### What they cost in training\n\n"
    "Measured apart from the runs, side by side at a longer context: time of a training step relative to none's, the "
    "memory that it takes beside parameters and optimizer, and seconds to trace and compile it."
)
TABLES_READING = (
    "Each cell is the mean over seeds ± half the width of its 95 % interval, by the bootstrap over seeds and documents "
    "together. The best of a column is bold. Differences are of the same seeds on the same windows."
)
SCALED = "scaling rules at evaluation"
LOSS_RANKING = "Behind the best loss over the whole window, in bits per byte, best at the longest length first."
COPY_RANKING = "Behind the best copy gain, in bits per byte, best at the longest distance first."
RANKING = (
    "± is half of a 95 % interval that holds for all pairs of curves of a column at once, so it also holds for the "
    "curve that happens to be best (ranks.csv). Bold: not distinguishable from the best."
)


def write_report(
    workdir: Path, question: str, command: str, groups: Mapping[str, str], expected: int, costs: Path | None = None
) -> Path:
    """Write the figures of a study, its TensorBoard curves and then report.md. Returns the path of the report.

    Reads results.csv, ranks.csv, members.csv and bases.csv. Includes discussion.md, written by a person, if it exists.

    Args:
      workdir: directory of the study.
      question: the question that the study answers, or "".
      command: the command that runs the study.
      groups: the title of the panel that shows each variant.
      expected: number of runs of the study, complete or not.
      costs: path of the table of encoding costs, if there is one.
    """
    results, members = read_results(workdir / "results.csv"), read_rows(workdir / "members.csv", MemberRow)
    ranks, bases = read_rows(workdir / "ranks.csv", Rank), read_rows(workdir / "bases.csv", Base)
    if len({base.base for base in bases}) == 1:
        bases = []
    evidence = evidence_of(members)
    measured = {name: row for name, row in read_costs(costs).items() if name in groups} if costs else {}
    with TensorBoard(workdir / "tensorboard" / "study", purge_step=0) as board:
        images = report.save_figures(workdir, _figures(results, groups, bases, measured), [board], 0)
        board.extrapolation_charts(metric for metric in METRICS if by_curve(results, metric))
    for (encoding, scaling), name in curve_names(results).items():
        own = workdir / "tensorboard" / f"mean-{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)}"  # over seeds
        extrapolation_curves(own, [row for row in results if (row.encoding, row.scaling) == (encoding, scaling)])
    sections = [f"# {escape_markdown(results[0].run)}", *([printable(question)] if question else [])]
    if len(members) < expected:
        sections.append(f"**{len(members)} of {expected} runs are done; what follows is of these.**")
    if discussion(workdir).exists():
        sections.append(printable(read_text(discussion(workdir)).strip()))
    sections += [
        *report.findings_section(
            evidence, findings(results, members), [] if without_intervals(results) else rankings(ranks, results)
        ),
        *(f"- {finding}." for finding in (base_figures.findings(results, bases) if bases else ())),
        "## Tables",
        f"The evaluation: {evidence}. {TABLES_READING if evidence.documents else task_report.TABLES}",
        *(_in_short(results, measured) if by_curve(results, MAIN_METRIC) else ()),
        *report.tables(results),
        *([COSTS_INTRODUCTION, costs_table(measured).markdown()] if measured else []),
        "## Figures",
        *images,
        "## Runs",
        _runs_table(members).markdown(),
    ]
    return report.write_sections(workdir, sections, command, _origins(members))


def _in_short(results: Sequence[Result], costs: Costs) -> Iterator[str]:
    yield f"### In short\n\n{READING}{f' {SHORT_COSTS_READING}' if costs else ''}"
    yield summary(results, costs).markdown()


def _runs_table(members: Sequence[MemberRow]) -> Table:
    rows = []
    for row in members:
        counts = f"{row.parameters:,}", f"{row.flops_per_token:.2e}"
        speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        rows.append((row.variant, str(row.seed), *counts, speed, row.stopped or "well"))
    return text_table(("variant", "seed", "parameters", "FLOPs per token", "tokens/s", "ended"), rows)


def evidence_of(members: Sequence[MemberRow]) -> Evidence:
    """The numbers of windows and documents in the evaluation, the same for all members."""
    return Evidence(members[0].windows_asked, members[0].windows, members[0].documents)


def discussion(workdir: Path) -> Path:
    """Path of a text in which a person discusses the results. The report includes it."""
    return workdir / "discussion.md"


def print_summary(workdir: Path, console: Console | None = None) -> None:
    """Print the main tables of a study and the paths of its other results."""
    warning = evidence_of(read_rows(workdir / "members.csv", MemberRow)).warning
    report.print_outcome(workdir, (*report.SHORT_METRICS, COPY_METRIC), warning, console or Console())


def findings(results: Sequence[Result], members: Sequence[MemberRow]) -> Iterator[str]:
    """Findings as Markdown sentences: the effect of added context, and the stopped runs.

    The effect is replaced by the sentence that there are no intervals, if there are none.
    """
    yield from all_findings(results)
    for row in members:
        if row.stopped:
            yield f"{bold(row.variant)}, seed {row.seed}, stopped and is left out: {escape_markdown(row.stopped)}."


def rankings(ranks: Sequence[Rank], results: Sequence[Result]) -> Iterator[str]:
    """Tables of how far each curve is behind the best, by the whole-window loss and by the copy gain.

    The curves are ranked at the longest length or distance.
    """
    for metric, reading in ((MAIN_METRIC, LOSS_RANKING), (COPY_METRIC, COPY_RANKING)):
        own = {(rank.curve, rank.eval_length): rank for rank in ranks if rank.metric == metric}
        if own:
            lengths = sorted({length for _, length in own})
            last = [name for name, length in own if length == lengths[-1]]
            names = [*last, *dict.fromkeys(name for name, _ in own if name not in last)]  # those that end before last
            unit = train_length(results)
            header = ("curve", *(f"{n} ({n / unit:.3g}x)" for n in lengths))
            rows = ((Cell(name), *(_behind(own.get((name, length))) for length in lengths)) for name in names)
            yield f"{reading} {RANKING}"
            yield Table("", header, tuple(rows)).markdown()


def _behind(rank: Rank | None) -> Cell:
    """The difference of a curve to the best, marked if its interval contains 0."""
    if rank is None:
        return Cell("")
    if rank.behind == 0:
        return Cell("best", True)
    if rank.ci_low is None or rank.ci_high is None:
        return Cell(f"{rank.behind:+.3f}")
    text = f"{rank.behind:+.3f} ± {(rank.ci_high - rank.ci_low) / 2:.3f}"
    return Cell(text, rank.ci_low <= 0 <= rank.ci_high)


def _figures(
    results: Sequence[Result], groups: Mapping[str, str], bases: Sequence[Base], costs: Costs
) -> Iterator[tuple[str, str, Figure]]:
    """File name, caption and figure of each figure that has data."""
    for metric, (name, caption) in report.FIGURES.items():
        if (panels := _panels(results, metric, groups)) and report.has_curve(results, metric):
            yield name, caption, figures.extrapolation_panels(panels, metric)
    yield from recall_figures(results)
    for metric, (name, caption) in BASE_FIGURES.items():
        if bases and by_curve(results, metric):
            yield name, caption, base_figures.base_map(results, bases, metric, METRICS[metric].title)
    if costs:
        step_times = {name: float(row["step_time_to_none"]) for name, row in costs.items()}
        yield "cost", COST_CAPTION, figures.cost_against_quality(results, step_times)


def _panels(results: Sequence[Result], metric: str, groups: Mapping[str, str]) -> dict[str, list[Result]]:
    """The curves of each panel. Curves with scaling rules share a panel with the unscaled curves of their variants."""
    panels: dict[str, list[Result]] = {}
    own = [row for row in results if row.metric in (metric, *figures.PAIRED.get(metric, ()))]
    scaled = {row.encoding for row in own if row.scaling != "none"}
    for row in own:
        if row.scaling == "none":
            panels.setdefault(groups[row.encoding], []).append(row)
    if scaled:
        panels[SCALED] = [row for row in own if row.encoding in scaled]
    return panels


def _origins(members: Sequence[MemberRow]) -> Iterator[tuple[str, str]]:
    for label, field in (("device", "device"), ("git revision", "git_revision"), ("versions", "versions")):
        yield label, "; ".join(dict.fromkeys(getattr(row, field) for row in members))
