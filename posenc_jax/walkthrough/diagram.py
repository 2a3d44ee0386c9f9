"""A diagram of the two paths of a token from text to attention: positional embedding and RoPE."""

import itertools
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from posenc_jax.reporting.figures import COLOURS, GREY
from posenc_jax.walkthrough.labels import Labels
from posenc_jax.walkthrough.trace import Trace

WIDTH, HEIGHT = 8.0, 5.2  # inches, which are also the units of the axes
BOX = (3.55, 0.44)
TINT = "#fbe3d6"  # of boxes in which positions enter


@dataclass(frozen=True)
class Step:
    """A box of the diagram."""

    text: str
    positions: bool = False  # whether positions enter here
    empty: bool = False  # whether this path does nothing at this step while the other path does something


def pipeline(trace: Trace, labels: Labels) -> Figure:
    """Positional embedding and RoPE side by side, from tokens to attention."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    start = [Step(labels("box.tokens")), Step(labels("box.lookup")), Step(labels("box.embedded"))]
    project, attend = Step(labels("box.project")), Step(labels("box.attend"))
    _column(
        axes,
        2.05,
        labels("box.left"),
        [*start, Step(labels("box.add"), positions=True), project, Step(labels("box.noturn"), empty=True), attend],
        labels("box.leftresult"),
        labels("box.layer"),
    )
    _column(
        axes,
        5.95,
        labels("box.right"),
        [*start, Step(labels("box.nothing"), empty=True), project, Step(labels("box.turn"), positions=True), attend],
        labels("box.rightresult"),
        labels("box.layer"),
    )
    return figure


def _column(axes: Axes, x: float, title: str, steps: list[Step], result: str, layer: str) -> None:
    """Draw boxes from top to bottom. The last three belong to an attention layer, which has a frame."""
    axes.text(x, HEIGHT - 0.22, title, ha="center", va="center", fontsize=11)
    heights = [4.62, 4.0, 3.38, 2.76, 1.86, 1.24, 0.62]
    frame = FancyBboxPatch(
        (x - 1.88, 0.34),
        3.76,
        2.0,
        boxstyle="round,pad=0,rounding_size=0.08",
        fill=False,
        edgecolor=GREY,
        linestyle="--",
    )
    axes.add_patch(frame)
    axes.text(x - 1.78, 2.22, layer, ha="left", va="center", fontsize=8, color=GREY)
    for y, step in zip(heights, steps, strict=True):
        box = FancyBboxPatch(
            (x - BOX[0] / 2, y - BOX[1] / 2),
            *BOX,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=TINT if step.positions else "white" if step.empty else "#f4f4f4",
            edgecolor=COLOURS[1] if step.positions else "#bbbbbb",
            linewidth=1.4 if step.positions else 0.8,
            linestyle=":" if step.empty else "-",
        )
        axes.add_patch(box)
        axes.text(x, y, step.text, ha="center", va="center", fontsize=9, color=GREY if step.empty else "black")
    for above, below in itertools.pairwise(heights):
        axes.annotate(
            "",
            (x, below + BOX[1] / 2),
            (x, above - BOX[1] / 2),
            arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
        )
    axes.text(x, 0.16, result, ha="center", va="center", fontsize=9, color=COLOURS[1])
