"""Heat maps of the recall of retrieval tasks, by the length of the text and the depth of what is hidden in it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from posenc_jax.reporting.figures import REFERENCE_LINE, STYLE, label, short_length
from posenc_jax.results import RETRIEVAL, Result, by_curve, train_length

COLUMNS = 4  # panels beside each other
GRID_STYLE: dict[Any, Any] = STYLE | {"axes.grid": False}
BOUNDARY: dict[str, Any] = REFERENCE_LINE | {"color": "#D55E00"}  # between lengths within and past the training length
COLOURS = "cividis"  # from 0 to 1; readers who confuse colours can tell it apart, and it prints in grey


def recall_figures(results: Sequence[Result]) -> Iterator[tuple[str, str, Figure]]:
    """File name, caption and figure of each task whose depths were chosen."""
    for task, answer in RETRIEVAL.items():
        if depths_of(results, task):
            caption = f"Recall of {task.replace('_', ' ')} ({answer}): right answers of all, by length and depth"
            yield f"recall_{task}", caption, recall_grid(results, task)


def depths_of(results: Sequence[Result], task: str) -> list[str]:
    """The depths at which a task was measured, as in the names of its metrics, from the start of a text to its end."""
    beginning = f"{task}_recall_at_depth_"
    return sorted({row.metric.removeprefix(beginning) for row in results if row.metric.startswith(beginning)})


@matplotlib.rc_context(GRID_STYLE)
def recall_grid(results: Sequence[Result], task: str) -> Figure:
    """The panels of `draw_grid` in a figure of their size."""
    names, lengths, depths = _sides(results, task)
    columns = min(len(names), COLUMNS)
    lines = math.ceil(len(names) / columns)
    size = (1.0 + columns * max(1.2, 0.5 + 0.42 * len(lengths)), 0.5 + lines * (0.5 + 0.26 * len(depths)))
    figure = Figure(figsize=size, layout="constrained")
    draw_grid(figure, results, task, columns)
    return figure


@matplotlib.rc_context(GRID_STYLE)
def draw_grid(figure: FigureBase, results: Sequence[Result], task: str, columns: int) -> None:
    """One panel per curve: right answers of all at each length (columns) and depth (rows), for a task with depths.

    A dashed line separates lengths past the training length. Lengths that the model cannot read are empty.
    """
    names, lengths, depths = _sides(results, task)
    by_depth = [by_curve(results, f"{task}_recall_at_depth_{depth}") for depth in depths]
    panels = figure.subplots(math.ceil(len(names) / columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        _draw(axes, [curves.get(name, {}) for curves in by_depth], lengths, train_length(results))
        axes.set_title(label(name, width=max(12, 6 * len(lengths))))
        axes.set_xticks(range(len(lengths)), labels=[short_length(length) for length in lengths])
        axes.set_yticks(range(len(depths)), labels=[f"{100 * float(depth):.0f} %" for depth in depths])
        axes.label_outer()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("length of the text (tokens)", size=9)
    figure.supylabel("depth", size=9)


def _sides(results: Sequence[Result], task: str) -> tuple[list[str], list[int], list[str]]:
    """The curves, lengths and depths of a task."""
    depths = depths_of(results, task)
    at_depths = {f"{task}_recall_at_depth_{depth}" for depth in depths}
    lengths = sorted({row.eval_length for row in results if row.metric in at_depths})
    return list(by_curve(results, f"{task}_recall")), lengths, depths


def _draw(axes: Axes, rows: Sequence[dict[int, Result]], lengths: Sequence[int], trained: int) -> None:
    values = np.array([[_value(own.get(length)) for length in lengths] for own in rows], np.float64)
    axes.imshow(values, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    for y, own in enumerate(rows):
        for x, length in enumerate(lengths):
            row = own.get(length)
            if row is not None and row.value is not None:
                colour = "black" if row.value > 0.5 else "white"
                text = f"{row.value * row.tokens:.0f}/{row.tokens}"
                axes.text(x, y, text, ha="center", va="center", color=colour, size=7)
    within = sum(length <= trained for length in lengths)
    if 0 < within < len(lengths):
        axes.axvline(within - 0.5, **BOUNDARY)


def _value(row: Result | None) -> float:
    return math.nan if row is None or row.value is None else row.value
