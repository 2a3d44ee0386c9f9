"""Tables of results for the terminal and for report.md."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import rich.table
from rich.console import Console
from rich.measure import Measurement
from rich.text import Text

from posenc_jax.results import METRICS, Result, by_curve, interval, named_by_scaling, ranked, train_length
from posenc_jax.untrusted import printable

BEYOND_TABLE = "beyond its table"
LEAST_NAME = 16  # characters of a name on a line of a narrow terminal
LONGEST_NUMBER = 24  # characters; longer cells are texts, which may be folded
UNLIMITED = 10_000  # characters
LATEX = {ord(character): rf"\{character}" for character in "#$%&_{}"} | {
    ord("\\"): r"\textbackslash{}",
    ord("~"): r"\textasciitilde{}",
    ord("^"): r"\textasciicircum{}",
    ord("±"): r"$\pm$",
    ord("<"): r"$<$",
    ord(">"): r"$>$",
    ord("|"): r"$|$",
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table. `best` marks the best value of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """The content of a table: a title, column names, and rows. The first cell of a row is its name."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, without its title. The best cells are bold."""
        lines = [[escape_markdown(name) for name in self.header], ["---", *("---:" for _ in self.header[1:])]]
        for row in self.rows:
            texts = (escape_markdown(cell.text) for cell in row)
            lines.append([f"**{text}**" if cell.best else text for cell, text in zip(row, texts, strict=True)])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def latex(self) -> str:
        """The table in LaTeX, with its title as caption. It needs the package booktabs. The best cells are bold."""
        lines = [[escape_latex(name) for name in self.header]]
        for row in self.rows:
            lines.append(
                [rf"\textbf{{{escape_latex(cell.text)}}}" if cell.best else escape_latex(cell.text) for cell in row]
            )
        header, *body = (rf"{' & '.join(line)} \\" for line in lines)
        columns = "l" + "r" * (len(self.header) - 1)
        begin = [r"\begin{table}", r"\centering", rf"\caption{{{escape_latex(self.title)}}}"]
        inner = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
        return "\n".join([*begin, *inner, r"\end{tabular}", r"\end{table}"]) + "\n"

    def print(self, console: Console) -> None:
        """Print the table. The best cells are bold and have a star. Names are folded, numbers are never cut.

        On a narrow terminal, intervals are left out, and columns that do not fit are printed below the others. A table
        that is printed to a file or a pipe has its full width.
        """
        if console.is_terminal:
            for part in self._fitting(console):
                console.print(part._rich())
        else:
            console.width, before = max(console.width, self._width(console)), console.width
            console.print(self._rich())
            console.width = before

    def _fitting(self, console: Console) -> Iterator["Table"]:
        """Tables that fit the console and together have the columns of this one."""
        width = console.width + max(max(len(row[0].text) for row in self.rows) - LEAST_NAME, 0)  # with folded names
        if self._width(console) <= width:
            yield self
            return
        rows = ([replace(cell, text=cell.text.partition(" ± ")[0]) for cell in row] for row in self.rows)
        short, chosen = replace(self, rows=tuple(map(tuple, rows))), [0]
        for column in range(1, len(self.header)):
            if len(chosen) > 1 and short._with([*chosen, column])._width(console) > width:
                yield short._with(chosen)
                chosen = [0]
            chosen.append(column)
        yield short._with(chosen)

    def _with(self, columns: Sequence[int]) -> "Table":
        """The table with only these columns."""
        header, *rows = (tuple(line[i] for i in columns) for line in (self.header, *self.rows))
        return replace(self, header=header, rows=tuple(rows))

    def _width(self, console: Console) -> int:
        unlimited = console.options.update(max_width=UNLIMITED)
        return Measurement.get(console, unlimited, self._rich()).maximum

    def _rich(self) -> rich.table.Table:
        table = rich.table.Table(title=Text(printable(self.title)), title_justify="left")
        for i, name in enumerate(self.header):
            whole = i > 0 and all(len(row[i].text) <= LONGEST_NUMBER for row in self.rows)
            text = Text(printable(name).replace(" ", "\n") if i else printable(name))
            table.add_column(text, justify="right" if i else "left", no_wrap=whole, overflow="fold")
        for row in self.rows:
            texts = [(printable(cell.text), cell.best) for cell in row]
            table.add_row(*(Text(text + " *", "bold") if best else Text(text + "  ") for text, best in texts))
        return table


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of texts, without a title."""
    return Table("", tuple(header), tuple(tuple(map(Cell, row)) for row in rows))


def escape_markdown(text: str) -> str:
    """Escape a text so that Markdown shows it unchanged, without emphasis, code, links, maths, HTML or new cells.

    Control characters are escaped as in `printable`.
    """
    text = re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(printable(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def escape_latex(text: str) -> str:
    """Escape a text so that LaTeX shows it unchanged. Control characters are escaped as in `printable`."""
    return " ".join(printable(text).split()).translate(LATEX)


def extrapolation_table(results: Sequence[Result], metric: str) -> Table:
    """A table with one row per curve, one column per length, and cells "value ± half the width of its 95 % interval".

    The best value of a column is marked if it has an interval and the column has another value. Values with the same
    digits are also marked, unless all have them. The last column has the effective lengths if the results have any.
    Raises ValueError if the results have several training lengths, and if `by_curve` does.
    """
    curves = by_curve(results, metric)
    unit = train_length(results)
    lengths = sorted({length for rows in curves.values() for length in rows})
    columns = [_cells([rows.get(length) for rows in curves.values()], metric) for length in lengths]
    effective = by_curve(results, "effective_length")
    if effective:
        columns.append([effective_length_cell(*effective.get(name, {}).values()) for name in curves])
    return Table(
        title=METRICS[metric].title,
        header=(
            "scaling" if named_by_scaling(results) else "encoding",
            *(f"{length} ({length / unit:.3g}x)" for length in lengths),
            *([f"effective length, trained on {unit}"] if effective else []),
        ),
        rows=tuple((Cell(name), *cells) for name, *cells in zip(curves, *columns, strict=True)),
    )


def _cells(column: Sequence[Result | None], metric: str) -> list[Cell]:
    order = ranked(column, metric)
    several = len({_digits(row) for row in order}) > 1
    best = _digits(order[0]) if several and interval(order[0]) else None
    return [Cell("") if row is None else Cell(format_value(row), _digits(row) == best is not None) for row in column]


def effective_length_cell(result: Result | None = None) -> Cell:
    """The effective length, with the upper end of its interval if that is longer."""
    if result is None or result.value is None or result.ci_high is None:
        return Cell("")
    return Cell(f"{result.value:.0f}" + (f" to {result.ci_high:.0f}" if result.ci_high > result.value else ""))


def _digits(result: Result) -> str:
    if result.value is None:
        return BEYOND_TABLE
    metric = METRICS[result.metric]
    return f"{result.value:{'+' if metric.is_gain else ''}z,.{metric.decimals}f}"


def format_value(result: Result) -> str:
    """The value with the decimals of its metric, and "± half the width of its interval" if there is one.

    The intervals of shares are far from symmetric, so both ends are shown.
    """
    ends, metric = interval(result), METRICS[result.metric]
    if ends is None:
        return _digits(result)
    if metric.is_share:
        return f"{_digits(result)} ({ends[0]:.2f} to {ends[1]:.2f})"
    return f"{_digits(result)} ± {(ends[1] - ends[0]) / 2:,.{metric.decimals}f}"
