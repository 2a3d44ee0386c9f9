"""The figures that compare attention and recurrence, as functions from plain numbers to a matplotlib Figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Transform

from posenc_jax.reporting.figures import GREY, REFERENCE_LINE, STYLE, label, styles

FLOOR = 1e-10  # smallest relative gradient norm that is shown
# A value and the two ends of its interval, by length or distance.
Curve = Mapping[int, tuple[float, float, float]]


@matplotlib.rc_context(STYLE)
def growth(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]], quantity: str, exponents: Mapping[str, Mapping[str, float]]
) -> Figure:
    """A cost against length (tokens), on two logarithmic axes. A power of the length is a straight line.

    `panels` and `exponents`, which the legends show, are by the title of the panel and the name of the model.
    """
    figure, all_axes = _panels(len(panels))
    style = _style_by_name(name for curves in panels.values() for name in curves)
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        for name, costs in curves.items():
            power = f"{name}: n^{exponents[title][name]:.2f}"
            axes.plot(list(costs), list(costs.values()), label=label(power), **style[name])
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        _length_axis(axes, sorted({length for costs in curves.values() for length in costs}))
        axes.set_title(title)
        axes.legend(loc="upper left", fontsize=7.5, labelspacing=0.25)
    low, high = all_axes[0].get_ylim()
    all_axes[0].set_ylim(low, low * (high / low) ** 1.3)  # the panels share it; legends stand above the curves
    all_axes[0].set_ylabel(quantity)
    return figure


@matplotlib.rc_context(STYLE)
def fading_gradients(panels: Mapping[str, Mapping[str, Curve]], *, relative_to: int | None = 1) -> Figure:
    """The norm of the gradient of the loss against the distance of the input, with one panel per stage of training.

    The vertical axis is logarithmic. An exponential decay is a straight line. Norms are divided by the norm at the
    distance `relative_to`, so that models of different scale can be compared. The default is 1 and not 0, because the
    token itself also reaches its loss through the residual stream. None: the norms are absolute.
    """
    figure, all_axes = _panels(len(panels))
    style = _style_by_name(name for curves in panels.values() for name in curves)
    handles: dict[str, Any] = {}
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        for name, curve in curves.items():
            distances, values = np.array(list(curve)), np.array(list(curve.values()))
            scaled = values / (1 if relative_to is None else curve[relative_to][0])
            scaled = np.where(scaled > 0, scaled, np.nan)
            every = max(1, len(distances) // 6)
            (handles[name],) = axes.plot(distances, scaled[:, 0], label=label(name), markevery=every, **style[name])
            _fill_band(axes, distances, *scaled.T[1:], style[name]["color"])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("distance n of the input (tokens)")
        axes.set_title(title)
    all_axes[0].set_ylim(bottom=max(FLOOR, all_axes[0].get_ylim()[0]))
    unit = "(nats per unit)" if relative_to is None else f"relative to n = {relative_to}"
    all_axes[0].set_ylabel(f"gradient norm {unit}")
    figure.legend(handles=list(handles.values()), loc="outside right center")
    return figure


@matplotlib.rc_context(STYLE)
def recall_by_distance(curves: Mapping[str, Curve], chance: float, trained: tuple[int, int]) -> Figure:
    """Accuracy against the distance of what is recalled, with intervals as bands, and the chance level.

    `trained` are the shortest and the longest distance (tokens) in training.
    """
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes, style = figure.subplots(), _style_by_name(curves)
    for name, curve in curves.items():
        distances, values = list(curve), np.array(list(curve.values()))
        axes.plot(distances, values[:, 0], label=label(name), **style[name])
        _fill_band(axes, distances, *values.T[1:], style[name]["color"])
    axes.axhline(chance, color=GREY, linestyle=(0, (1, 2)), linewidth=1, zorder=1)
    axes.axvline(trained[1], **REFERENCE_LINE, zorder=1)
    along, above = axes.get_yaxis_transform(), axes.get_xaxis_transform()
    _note(axes, "chance", (0, chance), along, offset=3, side="left")
    _note(axes, f"trained on {trained[0]} to {trained[1]}", (trained[1], 1), above, offset=-2, side="right")
    _note(axes, "beyond", (trained[1], 1), above, offset=4, side="left")
    _length_axis(axes, sorted({distance for curve in curves.values() for distance in curve}))
    axes.set_xlabel("distance of the marker's first appearance (tokens)")
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("values recalled")
    figure.legend(loc="outside right center")
    return figure


@matplotlib.rc_context(STYLE)
def logit_terms(terms: Mapping[str, np.ndarray]) -> Figure:
    """A map of each term of the logits [T, T] and, last, of their sum, on one scale of colours."""
    shown = {**terms, "sum": np.sum(list(terms.values()), axis=0)}
    largest = np.quantile(np.abs(list(shown.values())), 0.999)
    figure = Figure(figsize=(9.6, 2.3), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True)
    for axes, (name, values) in zip(panels, shown.items(), strict=True):
        image = axes.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        axes.set_title(name)
        axes.set_xlabel("key position")
        axes.grid(visible=False)
    panels[0].set_ylabel("query position")
    figure.colorbar(image, ax=panels, label="logit", shrink=0.8)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _style_by_name(names: Any) -> dict[str, dict[str, Any]]:
    """One style per name, the same in all panels."""
    return dict(zip(dict.fromkeys(names), styles(), strict=False))


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """Make the horizontal axis logarithmic, with marks at the measured powers of two, or at all lengths if none is."""
    axes.set_xscale("log", base=2)
    shown = [n for n in lengths if n & (n - 1) == 0] or list(lengths)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("length n (tokens)")


def _note(axes: Axes, text: str, place: tuple[float, float], transform: Transform, *, offset: float, side: str) -> None:
    """Write grey text above a place, at its `side`, and `offset` points to the right."""
    axes.annotate(text, place, (offset, 2), transform, textcoords="offset points", ha=side, va="bottom", color=GREY)


def _fill_band(axes: Axes, x: Sequence[float] | np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> None:
    """Draw intervals as a band behind their curve."""
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
