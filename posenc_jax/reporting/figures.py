"""The figures of a report. Each function turns results into a matplotlib Figure."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from posenc_jax.files import atomic_write
from posenc_jax.results import ACCURACIES, Result, by_curve, curve_names, interval, train_length

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a name may hold a dollar sign
}
# The colours of Okabe and Ito, which colour-blind readers can distinguish. Grey replaces yellow, invisible on white.
# The numbers of colours, markers and dashes have no common factor: curves of one colour differ in marker and dash.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 1.5)))
GREY = "#666666"
WIDTH = 8.4  # inches, of all figures, so that letters have the same size in all
MAX_CURVES = 6  # in a panel
# Metrics whose intervals are of paired differences, and which are drawn beside a metric. The first one found is drawn.
PAIRED = {"prefix_bits_per_byte": ("prefix_change_bits_per_byte", "difference_bits_per_byte")}
HINTS = {
    "context_gain_bits_per_byte": "above 0: uses the added context;  below 0: breaks",
    "difference_bits_per_byte": "below 0: better than the baseline",
    "prefix_change_bits_per_byte": "below 0: better than no scaling",
}
# A line at a reference value, such as the training length.
REFERENCE_LINE: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 3)), "linewidth": 0.9}


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png (200 dots per inch) and `path`.svg. The same figure gives the same bytes."""
    with atomic_write(Path(f"{path}.png")) as file:
        figure.savefig(file, format="png", dpi=200)
    with matplotlib.rc_context({"svg.hashsalt": "posenc_jax"}), atomic_write(Path(f"{path}.svg")) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


def extrapolation_curve(results: Sequence[Result], metric: str = "prefix_bits_per_byte") -> Figure:
    """A metric against evaluation length, distance or position, as in `extrapolation_panels`."""
    return extrapolation_panels({"": results}, metric)


@matplotlib.rc_context(STYLE)
def extrapolation_panels(groups: Mapping[str, Sequence[Result]], metric: str = "prefix_bits_per_byte") -> Figure:
    """A metric against evaluation length, distance or position, in panels of at most MAX_CURVES curves of a group.

    Curves are labelled at their ends. Thin bars are 95 % intervals. Losses have paired differences beside them, if the
    results have any, and then no bars: intervals of losses are mostly due to the text, which all curves share. Panels
    of one metric share their axes.

    The vertical axis of losses is logarithmic so that one exploding curve does not flatten the others. That of gains
    and differences is linear within ±0.1 bits per byte, around the sign change. The loss by position has one point per
    bin.
    """
    parts = [
        _Panel(title, own, metric, names) for title, own in groups.items() for names in _chunks(by_curve(own, metric))
    ]
    beside = [_paired(panel) for panel in parts]
    panels = [panel for pair in zip(parts, beside, strict=True) for panel in pair] if any(beside) else parts
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="col" if any(beside) else True)
    drawn = [(axes, panel) for axes, panel in zip(grid.ravel(), panels, strict=False) if panel is not None]
    for axes, panel in drawn:
        _AXES.get(panel.metric, _loss_axes)(axes, panel, bars=panel.metric != metric or not any(beside))
        axes.set_title(panel.title or HINTS.get(panel.metric, ""), pad=16)
    for axes in set(grid.ravel()) - {axes for axes, _ in drawn}:
        axes.set_visible(False)
    for column in grid.T:  # only the lowest panel of a column has the labels of the x axis
        *others, lowest = [axes for axes in column if axes.get_visible()]
        lowest.xaxis.set_tick_params(labelbottom=True)
        for axes in others:
            axes.set_xlabel("")
    for axes in grid[:, 1:].ravel() if not any(beside) else ():  # only the first of a row has those of the y axis
        axes.set_ylabel("")
    for axes, _ in drawn:  # once the limits of all are known
        axes.yaxis.set_tick_params(labelleft=True)
        label_ends(axes)
    return figure


@dataclass(frozen=True)
class _Panel:
    """A panel of some of the curves of a metric. The styles of curves depend on all results."""

    title: str
    results: Sequence[Result]
    metric: str
    names: Sequence[str]

    @property
    def curves(self) -> dict[str, dict[int, Result]]:
        return {name: rows for name, rows in by_curve(self.results, self.metric).items() if name in self.names}


def _chunks(names: Iterable[str]) -> list[Sequence[str]]:
    """The names in the fewest parts of at most MAX_CURVES, of about the same size."""
    own = list(names)
    return [list(part) for part in np.array_split(np.array(own, object), math.ceil(len(own) / MAX_CURVES))]


def _paired(panel: _Panel) -> _Panel | None:
    """The panel of paired differences beside a panel of losses."""
    for metric in PAIRED.get(panel.metric, ()):
        beside = _Panel("", panel.results, metric, panel.names)
        if beside.curves:
            return beside
    return None


@matplotlib.rc_context(STYLE)
def cost_against_quality(results: Sequence[Result], step_times: Mapping[str, float]) -> Figure:
    """Loss against the time of a training step relative to encoding none, with one point per encoding in `step_times`.

    There is one panel per evaluation length from the training length to eight times that length.
    """
    unit = train_length(results)
    own = [row for row in results if row.scaling == "none" and row.encoding in step_times]
    curves = by_curve(own, "prefix_bits_per_byte")
    lengths = sorted({length for rows in curves.values() for length in rows if unit <= length <= 8 * unit})
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharex=True, sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        for (name, rows), style in zip(curves.items(), styles(), strict=False):
            if length in rows and rows[length].value is not None:
                axes.plot(step_times[name], rows[length].value, label=label(name), **style | {"linestyle": ""})
        axes.axvline(1, **REFERENCE_LINE, zorder=1)
        axes.set_title(f"{length} tokens ({length / unit:.3g}x)")
        _log_ticks(axes)
    panels[0].set_ylabel("bits per byte (log scale)")
    figure.supxlabel("time of a training step relative to none's", size=9)
    _legend(figure, panels[0])
    return figure


@matplotlib.rc_context(STYLE)
def training_curve(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Training and validation loss against the training step, from the lines of metrics.jsonl."""
    figure, axes = _figure()
    shown = ("bits_per_byte", "training", COLOURS[2], ""), ("validation_bits_per_byte", "validation", COLOURS[1], "o")
    for key, label, colour, marker in shown:
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker)
    _log_ticks(axes)
    axes.set_xlabel("training step")
    axes.set_ylabel("bits per byte (log scale)")
    axes.legend(loc="upper right")
    return figure


@matplotlib.rc_context(STYLE)
def rotation_frequencies(spectra: Mapping[str, np.ndarray], train_length: int) -> Figure:
    """The number of full turns of each dimension pair within the training length, with one curve per scaling rule.

    `spectra` maps the label of a rule to its inverse frequencies [d/2] in radians per token. The horizontal lines at 1
    and 32 turns are YaRN's beta_slow and beta_fast. YaRN interpolates frequencies below beta_slow and keeps those above
    beta_fast.
    """
    parts = _chunks(spectra)
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    style = dict(zip(spectra, styles(), strict=False))
    for axes, names in zip(panels, parts, strict=True):
        for name in names:
            turns = train_length * np.asarray(spectra[name], np.float64) / (2 * np.pi)
            turns = np.where(turns > 0, turns, np.nan)
            axes.plot(turns, label=label(name), markevery=max(1, len(turns) // 8), **style[name])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for turns, text in ((1, "1 turn: YaRN interpolates below"), (32, "32 turns: YaRN keeps above")):
            axes.axhline(turns, **REFERENCE_LINE)
            place, above = axes.get_yaxis_transform(), (0, 2)
            axes.annotate(text, (1, turns), above, place, "offset points", ha="right", va="bottom", color=GREY)
        axes.set_xlabel("dimension pair")
    panels[0].set_ylabel(f"full turns within {train_length} tokens")
    for axes in panels:
        label_ends(axes)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    return figure, figure.subplots()


def styles() -> Iterator[dict[str, Any]]:
    """Colour, marker and dashes of each curve. Curves can be distinguished even without colour."""
    for i in itertools.count():
        colour, marker, dashes = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)]
        yield {"color": colour, "marker": marker, "linestyle": dashes}


def label(name: str, width: int = 24) -> str:
    """A name for a legend, wrapped at `width`.

    A name that begins with "_" gets a space before it, because matplotlib leaves such names out of legends.
    """
    lines = [" " if name.startswith("_") else ""]
    for word in re.findall(".+?(?:[ ,]|$)", name):
        if lines[-1].strip() and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


def label_ends(axes: Axes) -> None:
    """Label each curve at the right of the axes, at the height of its last value, in its colour. Labels do not overlap.

    The limits of the axes must be final.
    """
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    ends = [(axes.get_xlim()[0], np.asarray(line.get_ydata(), np.float64)) for line in lines]
    points = [(x, y[np.isfinite(y)][-1] if np.isfinite(y).any() else math.nan) for x, y in ends]
    heights = [axes.transAxes.inverted().transform(axes.transData.transform(point))[1] for point in points]
    line_height = 1.25 * matplotlib.rcParams["font.size"] / (axes.bbox.height * 72 / axes.figure.dpi)
    gaps = [line_height * (1 + str(line.get_label()).count("\n")) for line in lines]
    for line, height in zip(lines, _apart(heights, gaps), strict=True):
        if math.isfinite(height):
            place = (1.015, height)
            axes.annotate(str(line.get_label()), place, xycoords="axes fraction", va="center", color=line.get_color())


def _apart(heights: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """The nearest heights from 0 to 1, in the same order, at which labels of these sizes do not overlap."""
    order = sorted((i for i, height in enumerate(heights) if math.isfinite(height)), key=lambda i: heights[i])
    places, groups = [math.nan] * len(heights), []  # the labels of a group touch each other

    def bottom(group: list[int]) -> float:
        size = sum(sizes[i] for i in group)
        return max(min(sum(heights[i] for i in group) / len(group) - size / 2, 1 - size), 0)

    for i in order:
        groups.append([i])
        while len(groups) > 1 and bottom(groups[-1]) < bottom(groups[-2]) + sum(sizes[i] for i in groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    for group in groups:
        place = bottom(group)
        for i in group:
            places[i] = place + sizes[i] / 2
            place += sizes[i]
    return places


def short_length(length: int) -> str:
    """A length such as "8k" for 8192 tokens."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _loss_axes(axes: Axes, panel: _Panel, *, bars: bool) -> None:
    _curves_over_length(axes, panel, bars=bars)
    _log_ticks(axes)
    unit = "bits per byte" if panel.metric.endswith("bits_per_byte") else "perplexity per token"
    axes.set_ylabel(f"{unit} (log scale)")


def _signed_axes(axes: Axes, panel: _Panel, *, bars: bool) -> None:
    """Axes of a metric around zero."""
    axes.axhline(0, color=GREY, linewidth=1, zorder=1)
    _curves_over_length(axes, panel, bars=bars)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.update_datalim([(train_length(panel.results), end) for end in (-0.05, 0.05)])
    axes.margins(y=0.08)
    marks = np.outer((1, 2, 5), 10.0 ** np.arange(-1, 3)).ravel()
    axes.yaxis.set_major_locator(FixedLocator([*-marks, -0.05, 0, 0.05, *marks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0")
    axes.set_ylabel(f"{_SIGNED[panel.metric]} (bits per byte,\nlogarithmic beyond ±0.1)")


def _position_axes(axes: Axes, panel: _Panel, *, bars: bool) -> None:
    trained = train_length(panel.results)
    longest = trained
    for name, rows in panel.curves.items():
        edges = np.array([0, *rows])
        _plot(axes, panel, name, ((edges[:-1] + edges[1:]) / 2).tolist(), list(rows.values()), bars)
        longest = max(longest, edges[-1])
    _mark_training_length(axes, trained)
    step = trained * 2 ** max(0, int(np.ceil(np.log2(longest / trained / 8))))
    axes.set_xticks(np.arange(0, longest + 1, step))
    axes.set_xlim(0, longest)
    _log_ticks(axes)
    axes.set_xlabel("position in the window (tokens)")
    axes.set_ylabel("bits per byte (log scale)")


def _copy_gain_axes(axes: Axes, panel: _Panel, *, bars: bool) -> None:
    axes.axhline(0, color=GREY, linewidth=1, zorder=1)
    _curves_over_length(axes, panel, bars=bars)
    axes.set_xlabel("tokens between the two showings")
    axes.set_ylabel("loss drop on the second showing\n(bits per byte)")


def _share_axes(axes: Axes, panel: _Panel, *, bars: bool) -> None:
    _curves_over_length(axes, panel, bars=bars, trained="largest in training")
    axes.set(ylim=(-0.03, 1.03), xlabel="size of the sample", ylabel="share that is right")


_AXES = {
    "context_gain_bits_per_byte": _signed_axes,
    "difference_bits_per_byte": _signed_axes,
    "prefix_change_bits_per_byte": _signed_axes,
    "by_position_bits_per_byte": _position_axes,
    "copy_gain_bits_per_byte": _copy_gain_axes,
}
_AXES |= dict.fromkeys(ACCURACIES, _share_axes)
_SIGNED = {
    "context_gain_bits_per_byte": "context gain",
    "difference_bits_per_byte": "difference to the baseline",
    "prefix_change_bits_per_byte": "difference to no scaling",
}


def _curves_over_length(axes: Axes, panel: _Panel, *, bars: bool, trained: str = "training length") -> None:
    lengths: set[int] = set()
    for i, (name, rows) in enumerate(panel.curves.items()):
        lengths |= rows.keys()
        beside = 2 ** (0.07 * (i - (len(panel.curves) - 1) / 2)) if bars else 1  # so that bars do not hide each other
        _plot(axes, panel, name, [beside * length for length in rows], list(rows.values()), bars)
    _mark_training_length(axes, train_length(panel.results), trained)
    axes.set_xscale("log", base=2)
    shown = short_length if max(lengths) >= 10_000 else str
    axes.set_xticks(sorted(lengths), labels=[shown(length) for length in sorted(lengths)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("evaluation length (tokens)")


def _plot(axes: Axes, panel: _Panel, name: str, x: Sequence[float], rows: Sequence[Result], bars: bool) -> None:
    """Plot one curve, with its intervals as bars. Its style is the same in all figures of these results."""
    own = dict(zip(curve_names(panel.results).values(), styles(), strict=False))[name]
    shown = [i for i, row in enumerate(rows) if row.value is not None]
    if not shown:
        return
    ending = "" if len(shown) == len(rows) else f" (ends at {rows[shown[-1]].eval_length})"
    x = [x[i] for i in shown]
    values = np.array([rows[i].value for i in shown], np.float64)
    axes.plot(x, values, label=label(name + ending), markevery=max(1, len(x) // 8), **own)
    if bars:
        ends = [interval(rows[i]) or (math.nan, math.nan) for i in shown]  # values without an interval have no bar
        axes.vlines(x, *np.array(ends).T, color=own["color"], linewidth=0.9)


def _mark_training_length(axes: Axes, length: int, name: str = "training length") -> None:
    axes.axvline(length, **REFERENCE_LINE, zorder=1)
    axes.annotate(name, (length, 1), (0, 2), axes.get_xaxis_transform(), "offset points", ha="left", color=GREY)


def _log_ticks(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers. It has several ticks even within less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(7, steps=(1, 2, 5, 10)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    """Add a legend beside the axes."""
    figure.legend(handles=_from_top(axes), loc="outside right center")


def _from_top(axes: Axes) -> list[Line2D]:
    """The curves, ordered by their last value from top to bottom."""
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    return sorted(lines, key=lambda line: np.nan_to_num(np.asarray(line.get_ydata())[-1]), reverse=True)
