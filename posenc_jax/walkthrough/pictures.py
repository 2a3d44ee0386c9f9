"""The pictures of the walkthrough: functions from a trace to a matplotlib Figure."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from posenc_jax.encodings.base import Encoding
from posenc_jax.reporting.figures import COLOURS, DASHES, GREY, STYLE, save
from posenc_jax.walkthrough import rotation
from posenc_jax.walkthrough.fonts import Labels, Lettering, labels_of
from posenc_jax.walkthrough.trace import BASE, BIAS_SPAN, PAIRING, Trace, build, rates, table

DIVERGING = "RdBu_r"
SPAN = 100  # number of positions in pictures that do not depend on the sentence
BASES = (100.0, BASE, 500000.0)  # RoPE's default base, a smaller one, and that of Llama 3
LONGEST = 16384  # tokens; the maximum distance in the decay picture
BIASES = {"ALiBi": "alibi", "T5": "t5", "FIRE": "fire", "FoX": "fox"}
MAX_NAMES = 24  # tokens that fit on an axis by name
TINT = "#fbe3d6"  # of boxes in which positions enter


def draw(trace: Trace, folder: Path, language: str = "en") -> Lettering:
    """Write all pictures to `folder` as PNG and SVG, and the animation as GIF. Returns the fonts that were used."""
    labels = labels_of(trace, language)
    with matplotlib.rc_context(style(labels)):
        for name, picture in (PICTURES | (OF_MODEL if trace.trained else {})).items():
            save(picture(trace, labels), folder / name)
        rotation.animate(trace, labels, folder / "rotation.gif")
    return labels.lettering


def style(labels: Labels) -> dict:
    return {**STYLE, "font.family": list(labels.lettering.families)}


def pipeline(trace: Trace, labels: Labels, narrow: bool = False) -> Figure:
    """The two paths of a token from text to attention: positional embedding and RoPE. One below the other if narrow."""
    width, height = 3.9, 5.2  # inches, of a path
    rows, columns = (2, 1) if narrow else (1, 2)
    figure = Figure(figsize=(columns * width, rows * height))
    panels = figure.subplots(rows, columns)
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    for axes, side, (enter, turn) in zip(
        panels, ("left", "right"), (("add", "noturn"), ("nothing", "turn")), strict=True
    ):
        axes.set(xlim=(-width / 2, width / 2), ylim=(0, height))
        axes.axis("off")
        _path(axes, side, ("tokens", "lookup", "embedded", enter, "project", turn, "attend"), labels)
    return figure


def _path(axes: Axes, side: str, steps: Sequence[str], labels: Labels) -> None:
    """Draw a box for each step from top to bottom. The last three are in an attention layer, which has a frame."""
    axes.text(0, 4.98, labels(f"box.{side}"), ha="center", va="center", fontsize=11)
    rounded = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((-1.88, 0.34), 3.76, 2.0, rounded, fill=False, edgecolor=GREY, linestyle="--"))
    axes.text(-1.78, 2.22, labels("box.layer"), ha="left", va="center", fontsize=8, color=GREY)
    heights = [4.62, 4.0, 3.38, 2.76, 1.86, 1.24, 0.62]
    for y, step in zip(heights, steps, strict=True):
        positions, idle = step in ("add", "turn"), step in ("nothing", "noturn")
        box = FancyBboxPatch(
            (-1.775, y - 0.22),
            3.55,
            0.44,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=TINT if positions else "white" if idle else "#f4f4f4",
            edgecolor=COLOURS[1] if positions else "#bbbbbb",
            linewidth=1.4 if positions else 0.8,
            linestyle=":" if idle else "-",
        )
        axes.add_patch(box)
        colour = GREY if idle else "black"
        axes.text(0, y, labels(f"box.{step}"), ha="center", va="center", fontsize=9, color=colour)
    arrow = {"arrowstyle": "-|>", "color": GREY, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    for above, below in itertools.pairwise(heights):
        axes.annotate("", (0, below + 0.22), (0, above - 0.22), arrowprops=arrow)
    axes.text(0, 0.16, labels(f"box.{side}result"), ha="center", va="center", fontsize=9, color=COLOURS[1])


def sinusoidal(trace: Trace, labels: Labels) -> Figure:
    """The sinusoidal matrix, and the dot products of its rows against distance."""
    encoding, width = build("sinusoidal", trace.settings), trace.settings.width
    rows = table(encoding, np.arange(SPAN), width)
    figure, (matrix, products) = _panels(2, width_ratios=(1.25, 1))
    image = matrix.imshow(rows, cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    matrix.set(xlabel=labels("label.column"), ylabel=labels("position"))
    matrix.grid(False)
    figure.colorbar(image, ax=matrix, pad=0.02)
    for start, colour, dashes in zip((50, 200, 1000), COLOURS, DASHES, strict=False):
        distances = np.arange(-50, 51)
        values = table(encoding, start + distances, width) @ table(encoding, np.array([start]), width)[0]
        name = labels("label.from", position=start)
        products.plot(distances, values, color=colour, linestyle=dashes, label=name, linewidth=1.8)
    products.set(xlabel=labels("label.distance"), ylabel=labels("label.dot"))
    figure.legend(*products.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return figure


def wavelengths(trace: Trace, labels: Labels) -> Figure:
    """Some channel pairs of the sinusoidal matrix as waves, and the wavelengths of all its pairs and of RoPE's."""
    width, d = trace.settings.width, trace.head_dim
    places = np.linspace(0, SPAN, 8 * SPAN + 1)  # includes positions between tokens, so that the waves are smooth
    sines = table(build("sinusoidal", trace.settings), places, width)[:, 0::2]
    spectra = {f"PE, D = {width}": rates(build("sinusoidal", trace.settings)), f"RoPE, d = {d}": trace.theta}
    figure, (waves, lengths) = _panels(2)
    shown = sorted({*(width * eighth // 16 for eighth in range(4)), width // 2 - 1})
    for row, pair in enumerate(shown):
        waves.axhline(-2.4 * row, color="#e6e6e6", linewidth=0.8)
        waves.plot(places, sines[:, pair] - 2.4 * row, color=COLOURS[2])
    waves.set_yticks([-2.4 * row for row in range(len(shown))], labels=[f"i = {pair}" for pair in shown])
    waves.set(xlabel=labels("position"), title=labels("label.wave"))
    waves.grid(False)
    for (name, theta), colour, marker in zip(spectra.items(), COLOURS[1:], ("o", "s"), strict=False):
        lengths.plot(2 * math.pi / theta, color=colour, label=name, marker=marker, markevery=max(1, len(theta) // 8))
    lengths.set(yscale="log", ylabel=labels("label.wavelength"), xlabel=labels("label.pair"))
    _name_decades(lengths.yaxis, 10)
    lengths.xaxis.set_major_locator(MaxNLocator(integer=True))
    lengths.legend(loc="lower right")
    return figure


def added(trace: Trace, labels: Labels) -> Figure:
    """The first columns of the token embeddings, of the positional embedding and of their sum."""
    count = min(trace.settings.width, 64)
    matrices = {"label.embeddings": trace.embedded, "label.positional": trace.positional, "label.sum": trace.added}
    figure = Figure(figsize=(8, 1.2 + min(3 * 0.26 * max(4, len(trace.embedded)), 6.5)), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (key, values) in zip(panels, matrices.items(), strict=True):
        image = axes.imshow(values[:, :count], cmap=DIVERGING, vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
        axes.set_title(labels(key))
        axes.grid(False)
        _name_tokens(axes, trace, labels)
    panels[-1].set_xlabel(labels("label.column"))
    figure.colorbar(image, ax=list(panels), pad=0.02, aspect=30, extend="both")
    return figure


def products(trace: Trace, labels: Labels) -> Figure:
    """q · k in each head at the two pairs of positions, with RoPE and with positions added."""
    figure, panels = _panels(2, sharey=True)
    heads = np.arange(1, trace.settings.heads + 1)
    for axes, key, field in zip(panels, ("label.rope", "label.added"), ("product", "added"), strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        for at, marker, colour, size in ((trace.pair, "o", COLOURS[2], 9.0), (trace.shifted, "X", COLOURS[1], 5.5)):
            values = getattr(at, field)
            if values is not None:
                name = labels("label.bothat", q=at.q_position, k=at.k_position)
                axes.plot(heads, values, marker, color=colour, markersize=size, label=name, linestyle="none")
        axes.set(title=labels(key), xlabel=labels("label.heads"))
        axes.xaxis.set_major_locator(FixedLocator([*heads[:: math.ceil(len(heads) / 16)]]))
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel(labels("label.product"))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def decay(trace: Trace, labels: Labels) -> Figure:
    """q · k of equal vectors against distance, and the paper's bound for any vectors, for several bases."""
    d = trace.head_dim
    figure, (equal, bound) = _panels(2)
    ones = jnp.full((1, LONGEST, 1, d), 1 / math.sqrt(d))
    positions = jnp.arange(LONGEST)[None]
    for base, colour in zip(BASES, COLOURS[1:], strict=False):
        rope = build("rope", trace.settings, base=base, pairing=PAIRING)
        q, k = rope.rotate(ones, ones[:, :1], positions, positions[:, :1], (None, None))
        label = labels("label.base", base=f"{base:,.0f}")
        _ripples(equal, np.asarray(q[0, :, 0] @ k[0, 0, 0]), colour, label)
        _ripples(bound, _bound(rope), colour, label)
    equal.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    equal.set_ylabel(labels("label.decay"))
    bound.set_ylabel(labels("label.bound"))
    bound.set_ylim(0, 1.02)
    for axes in (equal, bound):
        axes.set(xscale="log", xlabel=labels("label.distance"), xlim=(1, LONGEST))
        _name_decades(axes.xaxis, 1)
    figure.legend(*bound.get_legend_handles_labels(), loc="outside lower center", ncols=len(BASES))
    return figure


def biases(trace: Trace, labels: Labels) -> Figure:
    """The biases that four encodings add to the logits of head 1, for the tokens of the sentence, repeated."""
    repeated, seen = np.resize(np.arange(len(trace.embedded)), BIAS_SPAN), np.tri(BIAS_SPAN, dtype=bool)
    figure = Figure(figsize=(8, 6.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    for axes, (name, key) in zip(panels, BIASES.items(), strict=True):
        values = bias(build(key, trace.settings), trace.embedded[repeated])
        image = axes.imshow(np.where(seen, values, np.nan), cmap="viridis", interpolation="nearest")
        axes.set(title=name, xlabel=labels("label.key"), ylabel=labels("label.query"))
        axes.grid(False)
        axes.label_outer()
        figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    return figure


def trained(trace: Trace, labels: Labels) -> Figure:
    """The attention weights of one head of a trained model, in each reading of the sentence."""
    model = trace.trained
    assert model is not None
    readings = {"trained": model.plain, "without": model.without, "moved": model.moved}
    readings = {name: reading for name, reading in readings.items() if reading is not None}
    figure = Figure(figsize=(8, 3.6 if len(readings) > 2 else 4.6), layout="constrained")
    panels = list(figure.subplots(1, len(readings), sharex=True, sharey=True))
    for axes, (name, reading) in zip(panels, readings.items(), strict=True):
        seen = np.tri(len(trace.tokens.ids), dtype=bool)
        weights = np.where(seen, model.weights(reading), np.nan)
        image = axes.imshow(weights, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.set(title=labels(f"label.{name}"), xlabel=labels("label.key"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(False)
    panels[0].set_ylabel(labels("label.query"))
    _name_tokens(panels[0], trace, labels)
    figure.colorbar(image, ax=panels, shrink=0.85, pad=0.02)
    return figure


def bias(encoding: Encoding, x: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T T"]:
    """The bias that an encoding adds to the logits of head 1, for tokens with these embeddings."""
    positions = jnp.arange(len(x))[None]
    ctx = encoding.prepare(jnp.asarray(x)[None], positions)
    nothing = jnp.zeros((1, len(x), 1, 1))
    heads = encoding.bias(nothing, nothing, jnp.zeros((1, 1, len(x), len(x))), positions, positions, ctx)
    assert heads is not None  # all four have one
    return np.asarray(heads[0, 0])


def _ripples(axes: Axes, values: Float[np.ndarray, "n"], colour: str, label: str) -> None:
    """Plot a faint curve over distances from 1, and its mean over logarithmically growing intervals."""
    edges = np.unique(np.geomspace(1, len(values), 29).round().astype(int))
    shown = np.unique(np.geomspace(1, len(values) - 1, 800).round().astype(int))
    means = [values[first:last].mean() for first, last in itertools.pairwise(edges)]
    axes.plot(shown, values[shown], color=colour, linewidth=0.6, alpha=0.4)
    axes.plot(np.sqrt(edges[:-1] * (edges[1:] - 1.0)), means, color=colour, linewidth=1.8, label=label)


def _bound(rope: Encoding) -> Float[np.ndarray, "n"]:
    """Su et al. 2021, §3.4.3: the mean over j of |sum over i < j of e^(i n theta_i)|, relative to n = 0."""
    angles = np.arange(LONGEST)[:, None] * rates(rope)
    sums = np.abs(np.cumsum(np.exp(1j * angles), axis=1)).mean(axis=1)
    return sums / sums[0]


def _panels(columns: int, **layout: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8, 3.3), layout="constrained")
    return figure, list(figure.subplots(1, columns, **layout))


def _name_decades(axis: Axis, first: float) -> None:
    """Mark the powers of ten from `first` to 10,000 on a logarithmic axis."""
    axis.set_major_locator(FixedLocator([x for x in (1.0, 10, 100, 1000, 10000) if x >= first]))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_locator(NullLocator())


def _name_tokens(axes: Axes, trace: Trace, labels: Labels) -> None:
    pieces = trace.tokens.pieces
    if len(pieces) <= MAX_NAMES:
        axes.set_yticks(range(len(pieces)), labels=[labels.token(i) for i in range(len(pieces))])
    else:
        axes.set_ylabel(labels("position"))


PICTURES: dict[str, Callable[[Trace, Labels], Figure]] = {
    "pipeline": pipeline,
    "pipeline_narrow": partial(pipeline, narrow=True),
    "sinusoidal": sinusoidal,
    "wavelengths": wavelengths,
    "sum": added,
    "rotation": rotation.still,
    "products": products,
    "decay": decay,
    "biases": biases,
}
OF_MODEL = {"trained": trained}  # pictures of a trained model
