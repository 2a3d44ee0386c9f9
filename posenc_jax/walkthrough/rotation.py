"""RoPE as arrows that rotate in three planes of a head: a still picture and an animation."""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc

from posenc_jax.reporting.figures import COLOURS
from posenc_jax.walkthrough.fonts import Labels
from posenc_jax.walkthrough.trace import PAIRING, Trace, build, rotated

Q_COLOUR, K_COLOUR, ARC_COLOUR = COLOURS[2], COLOURS[1], COLOURS[3]
FRAMES_PER_TOKEN = 4
TOKENS = 10  # number of tokens by which the animation moves both positions
FRAMES_PER_SECOND = 8


def still(trace: Trace, labels: Labels) -> Figure:
    """q and k at the two pairs of positions that the walkthrough compares."""
    figure = Figure(figsize=(8, 3.4))
    for axes, pair in zip(_planes(figure, labels, trace, legend=True), pairs(trace), strict=True):
        for at, dashes, radius in ((trace.pair, "-", 0.32), (trace.shifted, (0, (2, 1.5)), 0.45)):
            q, k = _plane(at.q[0], pair), _plane(at.k[0], pair)
            _arrow(axes, q, Q_COLOUR, dashes)
            _arrow(axes, k, K_COLOUR, dashes)
            _arc(axes, q, k, radius)
        angle = f"{_angle(q, k):+.3f}".replace("-", "\N{MINUS SIGN}")
        axes.text(0, -1.16, labels("label.between", angle=angle), ha="center", va="top", fontsize=9)
    return figure


def animate(trace: Trace, labels: Labels, path: Path) -> None:
    """Write a looping GIF that shows q at position m and k at the distance of the sentence, for increasing m."""
    rope = build("rope", trace.settings, pairing=PAIRING)
    distance = trace.pair.k_position - trace.pair.q_position
    figure = Figure(figsize=(7.2, 3.1))
    panels = _planes(figure, labels, trace, legend=False)
    at_q, at_k, at_product = (
        figure.text(x, 0.03, "", ha="left", va="bottom", fontsize=10, color=colour)
        for x, colour in ((0.22, Q_COLOUR), (0.4, K_COLOUR), (0.62, "black"))
    )
    writer = PillowWriter(fps=FRAMES_PER_SECOND)
    with writer.saving(figure, str(path), dpi=100):
        for frame in range(TOKENS * FRAMES_PER_TOKEN):
            m = frame / FRAMES_PER_TOKEN
            q, k = rotated(rope, trace.q[0], m)[0], rotated(rope, trace.k[-1], m + distance)[0]
            for axes, pair in zip(panels, pairs(trace), strict=True):
                for old in [*axes.patches, *axes.texts]:
                    old.remove()
                _arrow(axes, _plane(q, pair), Q_COLOUR)
                _arrow(axes, _plane(k, pair), K_COLOUR)
                _arc(axes, _plane(q, pair), _plane(k, pair), 0.32)
            at_q.set_text(f"q: m = {m:.2f}")
            at_k.set_text(f"k: m + {distance} = {m + distance:.2f}")
            at_product.set_text(f"q · k = {q @ k:.4f}".replace("-", "\N{MINUS SIGN}"))
            writer.grab_frame()


def pairs(trace: Trace) -> tuple[int, int, int]:
    """Three pairs of channels: the fastest one, and two slower ones that still rotate visibly within a few tokens."""
    d = trace.head_dim
    return 0, max(1, d // 16), max(2, d // 8)


def _planes(figure: Figure, labels: Labels, trace: Trace, legend: bool) -> list[Axes]:
    panels = list(figure.subplots(1, 3, gridspec_kw={"wspace": 0.08}))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.14)
    for axes, pair in zip(panels, pairs(trace), strict=True):
        circle = np.linspace(0, 2 * math.pi, 200)
        axes.plot(np.cos(circle), np.sin(circle), color="#dddddd", linewidth=0.8)
        axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
        axes.axis("off")
        axes.set_title(labels("label.plane", pair=pair, theta=f"{trace.theta[pair]:.3f}"), loc="center")
    if legend:
        for at, dashes in ((trace.pair, "-"), (trace.shifted, (0, (2, 1.5)))):
            for name, position, colour in (("q", at.q_position, Q_COLOUR), ("k", at.k_position, K_COLOUR)):
                text = labels("label.at", name=name, position=position)
                panels[0].plot([], [], color=colour, linestyle=dashes, linewidth=1.8, label=text)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=4, handlelength=2.6)
    return panels


def _plane(vector: Float[np.ndarray, "d"], pair: int) -> Float[np.ndarray, "2"]:
    """A pair of channels, scaled to length 1."""
    point = vector[2 * pair : 2 * pair + 2]
    return point / np.linalg.norm(point)


def _angle(q: Float[np.ndarray, "2"], k: Float[np.ndarray, "2"]) -> float:
    """The angle from q to k, in radians, between -pi and pi."""
    return math.atan2(q[0] * k[1] - q[1] * k[0], q @ k)


def _arrow(axes: Axes, point: Float[np.ndarray, "2"], colour: str, dashes: object = "-") -> None:
    shape = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "linestyle": dashes, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", tuple(point), (0, 0), arrowprops=shape)


def _arc(axes: Axes, q: Float[np.ndarray, "2"], k: Float[np.ndarray, "2"], radius: float) -> None:
    start, angle = math.degrees(math.atan2(q[1], q[0])), math.degrees(_angle(q, k))
    first, last = sorted((start, start + angle))
    axes.add_patch(Arc((0, 0), 2 * radius, 2 * radius, theta1=first, theta2=last, color=ARC_COLOUR, linewidth=1.6))
