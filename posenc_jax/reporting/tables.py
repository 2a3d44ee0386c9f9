"""The rows of results.csv, and the tables made of them for the terminal and for report.md."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.table
from rich.text import Text

from posenc_jax.reporting.rows import read_rows, write_rows
from posenc_jax.untrusted import DamagedError, printable

BEYOND_TABLE = "beyond its table"
MOST_CELLS = 50_000  # of a table that is read


@dataclass(frozen=True)
class Result:
    """One row of results.csv: one number, its 95 % interval, and what it was measured on.

    `value` is None where the evaluation cannot be done (learned positions past their table); the interval is None where
    there is none, as of windows of one document. Lengths are in tokens; `tokens` is how many were scored. Gains and
    multiples such as "2x" refer to `train_length`, the length that a model was first trained on. `seed` is None for a
    mean over the seeds of a study, whose variants stand in `encoding`.
    """

    run: str
    encoding: str
    scaling: str
    seed: int | None
    train_length: int
    eval_length: int
    metric: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    tokens: int


@dataclass(frozen=True)
class Metric:
    """How a metric of results.csv is shown."""

    title: str
    reading: str
    decimals: int = 3
    is_gain: bool = False  # signed, and higher is better


METRICS = {
    "prefix_bits_per_byte": Metric(
        "Bits per byte over the whole window",
        "Mean over positions [0, L), as when text is cut into windows of L tokens. Lower is better.",
    ),
    "difference_bits_per_byte": Metric(
        "Difference to the baseline, bits per byte",
        "Loss over the whole window minus that of the baseline, of the same seeds on the same windows: intervals of "
        "the difference itself. Lower is better.",
    ),
    "tail_bits_per_byte": Metric(
        "Bits per byte at the end of the window",
        "Mean over the last positions before L, where every token has almost L tokens of context, as with a sliding "
        "window. Lower is better.",
    ),
    "context_gain_bits_per_byte": Metric(
        "Context gain, bits per byte",
        "Loss of the last tokens of the window given only the training length of context, minus that given L tokens. "
        "Positive: the model uses the extra context. Zero: it survives it. Negative: it breaks. Higher is better.",
        is_gain=True,
    ),
    "prefix_change_bits_per_byte": Metric(
        "Change by the scaling rule, bits per byte",
        "Loss over the whole window under the rule minus that under none, on the same windows: intervals of the "
        "difference itself, much narrower than those of the two losses. Lower is better.",
    ),
    "copy_gain_bits_per_byte": Metric(
        "Text found again, bits per byte",
        "Text is shown a second time after so many tokens: its loss after text of another document was shown first, "
        "minus that after its own. Zero: the model finds nothing at that distance. Higher is better.",
        is_gain=True,
    ),
    "prefix_perplexity": Metric(
        "Perplexity per token over the whole window", "Mean over positions [0, L). Lower is better.", decimals=2
    ),
    "tail_perplexity": Metric(
        "Perplexity per token at the end of the window",
        "Mean over the last positions before L. Lower is better.",
        decimals=2,
    ),
}


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write results.csv whole or not at all. Floats are written so that `read_results` gives them back exactly."""
    write_rows(path, Result, results)


def read_results(path: Path) -> list[Result]:
    """The rows of results.csv. Raises DamagedError, which names the file and the line."""
    results = read_rows(path, Result)
    for line, row in enumerate(results, 2):
        if min(row.train_length, row.eval_length) < 1:
            raise DamagedError(f"{path}, line {line}: lengths must be at least 1")
    curves, lengths = ({(row.encoding, row.scaling) for row in results}, {row.eval_length for row in results})
    if len(curves) * len(lengths) > MOST_CELLS:
        raise DamagedError(f"{path} has {len(curves)} curves at {len(lengths)} lengths, too many to be shown")
    return results


@dataclass(frozen=True)
class Cell:
    """One cell of a table; `best` marks the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table before it is drawn: a title, column names, and rows whose first cell is their name."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, without its title; the best cells are bold."""
        lines = [[escape_markdown(name) for name in self.header], ["---", *("---:" for _ in self.header[1:])]]
        for row in self.rows:
            texts = (escape_markdown(cell.text) for cell in row)
            lines.append([f"**{text}**" if cell.best else text for cell, text in zip(row, texts, strict=True)])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def rich(self) -> rich.table.Table:
        """The table for a terminal; the best cells are bold and starred."""
        table = rich.table.Table(title=Text(printable(self.title)), title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(Text(printable(name)), justify="right" if i else "left", no_wrap=not i)
        for row in self.rows:
            texts = [(printable(cell.text), cell.best) for cell in row]
            table.add_row(*(Text(text + " *", "bold") if best else Text(text + "  ") for text, best in texts))
        return table


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of texts, without a title."""
    return Table("", tuple(header), tuple(tuple(map(Cell, row)) for row in rows))


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: no emphasis, code, links, maths, HTML or new cells come out of it.

    Control characters are shown as of `printable`.
    """
    text = re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(printable(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def extrapolation_table(results: Sequence[Result], metric: str) -> Table:
    """One row per curve, one column per evaluation length, cells "value ± half the width of its 95 % interval".

    The best of a column is marked, with all that equal it at the digits shown, if there is something to compare it to
    and it has an interval. Raises ValueError where `by_curve` does, for results of several training lengths, and for
    more than MOST_CELLS.
    """
    curves = by_curve(results, metric)
    unit = train_length(results)
    lengths = sorted({length for rows in curves.values() for length in rows})
    columns = [_cells([rows.get(length) for rows in curves.values()], metric) for length in lengths]
    return Table(
        title=METRICS[metric].title,
        header=(
            "scaling" if _named_by_scaling(results) else "encoding",
            *(f"{length} ({length / unit:.3g}x)" for length in lengths),
        ),
        rows=tuple((Cell(name), *cells) for name, *cells in zip(curves, *columns, strict=True)),
    )


def by_curve(results: Sequence[Result], metric: str) -> dict[str, dict[int, Result]]:
    """The results of one metric by curve and, in increasing order, evaluation length.

    Raises ValueError for two values of one curve at one length, as of two seeds: average them first.
    """
    names = curve_names(results)
    curves: dict[str, dict[int, Result]] = {}
    for row in sorted((row for row in results if row.metric == metric), key=lambda row: row.eval_length):
        name = names[row.encoding, row.scaling]
        other = curves.setdefault(name, {}).setdefault(row.eval_length, row)
        if other is not row:
            raise ValueError(
                f"two values of {metric} for {name!r} at length {row.eval_length}: "
                f"run {other.run!r} seed {other.seed}, run {row.run!r} seed {row.seed}"
            )
    return {name: curves[name] for name in names.values() if name in curves}


def curve_names(results: Sequence[Result]) -> dict[tuple[str, str], str]:
    """The name of each (encoding, scaling) in tables and figures, in order of first appearance in the results.

    The scaling rule where all are of one encoding that was scaled; else the encoding, with the rule if there is one.
    """
    pairs = dict.fromkeys((result.encoding, result.scaling) for result in results)
    if _named_by_scaling(results):
        return {pair: printable(pair[1]) for pair in pairs}
    return {pair: printable(pair[0] if pair[1] == "none" else f"{pair[0]} {pair[1]}") for pair in pairs}


def _named_by_scaling(results: Sequence[Result]) -> bool:
    return len({row.encoding for row in results}) == 1 and len({row.scaling for row in results}) > 1


def _cells(column: Sequence[Result | None], metric: str) -> list[Cell]:
    order = ranked(column, metric)
    best = _digits(order[0]) if len(order) > 1 and interval(order[0]) else None
    return [Cell("") if row is None else Cell(format_value(row), _digits(row) == best is not None) for row in column]


def _digits(result: Result) -> str:
    if result.value is None:
        return BEYOND_TABLE
    metric = METRICS[result.metric]
    return f"{result.value:{'+' if metric.is_gain else ''}z,.{metric.decimals}f}"


def train_length(results: Sequence[Result]) -> int:
    """The training length of the results, in tokens. Raises ValueError unless there is exactly one.

    Gains over different short contexts are not comparable.
    """
    lengths = {result.train_length for result in results}
    if len(lengths) != 1:
        raise ValueError(f"results must be of one training length, not of {sorted(lengths)}")
    return lengths.pop()


def format_value(result: Result) -> str:
    """The value with its metric's digits, "± half the width of its interval" where there is one."""
    ends = interval(result)
    if ends is None:
        return _digits(result)
    return f"{_digits(result)} ± {(ends[1] - ends[0]) / 2:,.{METRICS[result.metric].decimals}f}"


def interval(result: Result) -> tuple[float, float] | None:
    """The two ends of the interval of a result; None where it has none."""
    return None if result.ci_low is None or result.ci_high is None else (result.ci_low, result.ci_high)


def ranked(results: Iterable[Result | None], metric: str) -> list[Result]:
    """The results of one metric and length that have a value, best first."""
    valued = [(row.value, row) for row in results if row is not None and row.value is not None]
    order = sorted((pair for pair in valued if not math.isnan(pair[0])), key=lambda pair: pair[0])
    return [row for _, row in (reversed(order) if METRICS[metric].is_gain else order)]
