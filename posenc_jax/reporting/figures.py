"""The figures of a report. Each function turns results into a matplotlib Figure."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from posenc_jax.files import atomic_write
from posenc_jax.results import Result, by_curve, curve_names, interval, train_length

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
# A line at a reference value, such as the training length.
REFERENCE_LINE: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 3)), "linewidth": 0.9}


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png (200 dots per inch) and `path`.svg. The same figure gives the same bytes."""
    with atomic_write(Path(f"{path}.png")) as file:
        figure.savefig(file, format="png", dpi=200)
    with matplotlib.rc_context({"svg.hashsalt": "posenc_jax"}), atomic_write(Path(f"{path}.svg")) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


@matplotlib.rc_context(STYLE)
def extrapolation_curve(results: Sequence[Result], metric: str = "prefix_bits_per_byte") -> Figure:
    """A metric against evaluation length, distance or position. Each curve has its 95 % interval as a band.

    The vertical axis of losses is logarithmic so that one exploding curve does not flatten the others. That of context
    gains is linear within ±0.1 bits per byte, around the sign change. The loss by position has one point per bin.
    """
    figure, axes = _figure()
    _AXES.get(metric, _loss_axes)(axes, results, metric)
    if metric == "context_gain_bits_per_byte":
        axes.set_title("above 0: uses the context past its training length;  below 0: breaks", color=GREY, pad=16)
    _legend(figure, axes)
    return figure


@matplotlib.rc_context(STYLE)
def extrapolation_panels(
    groups: Mapping[str, Sequence[Result]], metric: str = "prefix_bits_per_byte", *, bands: bool = False
) -> Figure:
    """A metric against evaluation length or distance, with one panel per group of curves. Panels share their axes.

    `bands` draws the intervals. They make a figure with many curves unreadable.
    """
    columns = min(len(groups), 2)
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(3.2 + 3.2 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (title, results) in zip(panels, groups.items(), strict=False):
        _AXES[metric](axes, results, metric, bands=bands)
        axes.set_title(title, pad=16)
        axes.legend(handles=_from_top(axes), loc="center left", bbox_to_anchor=(1, 0.5))
        axes.label_outer()
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    if len(groups) % 2 and len(groups) > 1:  # there is no panel below the last but one
        panels[len(groups) - 2].set_xlabel(panels[len(groups) - 1].get_xlabel())
        panels[len(groups) - 2].xaxis.set_tick_params(labelbottom=True)
    return figure


@matplotlib.rc_context(STYLE)
def cost_against_quality(results: Sequence[Result], step_times: Mapping[str, float]) -> Figure:
    """Loss against the time of a training step relative to encoding none, with one point per encoding in `step_times`.

    There is one panel per evaluation length from the training length to eight times that length.
    """
    unit = train_length(results)
    own = [row for row in results if row.scaling == "none" and row.encoding in step_times]
    curves = by_curve(own, "prefix_bits_per_byte")
    lengths = sorted({length for rows in curves.values() for length in rows if unit <= length <= 8 * unit})
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
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
    figure, axes = _figure(width=4.8)
    for key, label, colour, marker in (
        ("bits_per_byte", "training", COLOURS[2], ""),
        ("validation_bits_per_byte", "validation", COLOURS[1], "o"),
    ):
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
    figure, axes = _figure()
    for (name, inverse_frequencies), style in zip(spectra.items(), styles(), strict=False):
        turns = train_length * np.asarray(inverse_frequencies, np.float64) / (2 * np.pi)
        turns = np.where(turns > 0, turns, np.nan)
        axes.plot(turns, label=label(name), markevery=max(1, len(turns) // 8), **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for turns, text in ((1, "1 turn: YaRN interpolates below"), (32, "32 turns: YaRN keeps above")):
        axes.axhline(turns, **REFERENCE_LINE)
        axes.annotate(
            text, (1, turns), (0, 2), axes.get_yaxis_transform(), "offset points", ha="right", va="bottom", color=GREY
        )
    axes.set_xlabel("dimension pair")
    axes.set_ylabel(f"full turns within {train_length} tokens")
    _legend(figure, axes)
    return figure


def _figure(width: float = 6.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 3.2), layout="constrained")
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


def _loss_axes(axes: Axes, results: Sequence[Result], metric: str, *, bands: bool = True) -> None:
    _curves_over_length(axes, results, metric, bands=bands)
    _log_ticks(axes)
    unit = "bits per byte" if metric.endswith("bits_per_byte") else "perplexity per token"
    axes.set_ylabel(f"{unit} (log scale)")


def _gain_axes(axes: Axes, results: Sequence[Result], metric: str, *, bands: bool = True) -> None:
    axes.axhline(0, color=GREY, linewidth=1, zorder=1)
    _curves_over_length(axes, results, metric, bands=bands)
    axes.set_yscale("symlog", linthresh=0.1)
    low, high = axes.dataLim.intervaly
    axes.set_ylim(min(1.3 * low, -0.05), max(1.3 * high, 0.05))
    marks = np.outer((1, 2, 5), 10.0 ** np.arange(-1, 3)).ravel()
    axes.yaxis.set_major_locator(FixedLocator([*-marks, -0.05, 0, 0.05, *marks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0")
    axes.set_ylabel("context gain (bits per byte,\nlogarithmic beyond ±0.1)")


def _position_axes(axes: Axes, results: Sequence[Result], metric: str, *, bands: bool = True) -> None:
    trained = train_length(results)
    longest = trained
    for name, rows in by_curve(results, metric).items():
        edges = np.array([0, *rows])
        _plot(axes, results, name, ((edges[:-1] + edges[1:]) / 2).tolist(), list(rows.values()), bands)
        longest = max(longest, edges[-1])
    _mark_training_length(axes, trained)
    step = trained * 2 ** max(0, int(np.ceil(np.log2(longest / trained / 8))))
    axes.set_xticks(np.arange(0, longest + 1, step))
    axes.set_xlim(0, longest)
    _log_ticks(axes)
    axes.set_xlabel("position in the window (tokens)")
    axes.set_ylabel("bits per byte (log scale)")


def _copy_gain_axes(axes: Axes, results: Sequence[Result], metric: str, *, bands: bool = True) -> None:
    axes.axhline(0, color=GREY, linewidth=1, zorder=1)
    _curves_over_length(axes, results, metric, bands=bands)
    axes.set_xlabel("tokens between the two showings")
    axes.set_ylabel("loss drop on the second showing\n(bits per byte)")


_AXES = {
    "prefix_bits_per_byte": _loss_axes,
    "context_gain_bits_per_byte": _gain_axes,
    "by_position_bits_per_byte": _position_axes,
    "copy_gain_bits_per_byte": _copy_gain_axes,
}


def _curves_over_length(axes: Axes, results: Sequence[Result], metric: str, *, bands: bool) -> None:
    lengths: set[int] = set()
    for name, rows in by_curve(results, metric).items():
        lengths |= rows.keys()
        _plot(axes, results, name, list(rows), list(rows.values()), bands)
    _mark_training_length(axes, train_length(results))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), labels=[str(length) for length in sorted(lengths)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("evaluation length (tokens)")


def _plot(
    axes: Axes, results: Sequence[Result], name: str, x: Sequence[float], rows: Sequence[Result], bands: bool
) -> None:
    """Plot one curve, with its intervals as a band. Its style is the same in all figures of these results."""
    own = dict(zip(curve_names(results).values(), styles(), strict=False))[name]
    shown = [i for i, row in enumerate(rows) if row.value is not None]
    if not shown:
        return
    ending = "" if len(shown) == len(rows) else f" (ends at {rows[shown[-1]].eval_length})"
    x = [x[i] for i in shown]
    values = np.array([rows[i].value for i in shown], np.float64)
    axes.plot(x, values, label=label(name + ending), markevery=max(1, len(x) // 8), **own)
    if bands:
        ends = [interval(rows[i]) or (math.nan, math.nan) for i in shown]  # values without an interval leave a gap
        low, high = np.array(ends).T
        fill_band(axes, x, low, high, own["color"])


def fill_band(axes: Axes, x: Sequence[float] | np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> None:
    """Draw intervals as a band behind their curve."""
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _mark_training_length(axes: Axes, length: int) -> None:
    axes.axvline(length, **REFERENCE_LINE, zorder=1)
    axes.annotate(
        "training length", (length, 1), (0, 2), axes.get_xaxis_transform(), "offset points", ha="left", color=GREY
    )


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
