"""Figures and findings of a study of RoPE bases: measurements compared with theory."""

from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from posenc_jax.reporting.figures import REFERENCE_LINE, STYLE
from posenc_jax.results import Base, Result, train_length

FOUND = 0.5  # text counts as found again if its copy gain is at least this share of that at the nearest distance
BOUND_READING = (
    "B_m is computed from its definition. The table of smallest bases in Men et al. 2024 is not reproduced exactly. "
    "For 1,024 to 32,768 tokens and 128 channels, the first base found with B_m ≥ 0 is 0.73 to 1.07 times the "
    "published one"
)


@matplotlib.rc_context(STYLE)
def base_map(results: Sequence[Result], bases: Sequence[Base], metric: str, label: str) -> Figure:
    """A metric of every base (x) at every length or distance (y), with theory. There is one panel per head width.

    The lines show the training length, T_extra and the distance up to which B_m >= 0. The vertical lines show the bases
    below which every pair rotates by at least a quarter, a half and a whole turn in training.
    """
    widths = sorted({base.head_dim for base in bases})
    figure = Figure(figsize=(4.2 * len(widths), 3.8), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    found = values(results, metric)
    lengths = sorted({length for _, length in found})
    shown = [value for value in found.values() if value is not None]
    norm = TwoSlopeNorm(0, min(*shown, -1e-3), max(*shown, 1e-3)) if min(shown) < 0 else LogNorm(min(shown), max(shown))
    for axes, width in zip(panels, widths, strict=True):
        own = sorted((base for base in bases if base.head_dim == width), key=lambda base: base.base)
        grid = [[found.get((base.variant, length)) for base in own] for length in lengths]
        cells = np.array([[np.nan if value is None else value for value in row] for row in grid])
        colours = "RdBu" if isinstance(norm, TwoSlopeNorm) else "viridis_r"
        axes.pcolormesh(_edges([b.base for b in own]), _edges(lengths), cells, norm=norm, cmap=colours, alpha=0.85)
        _theory(axes, own, train_length(results), lengths)
        axes.set_title(f"heads of {width} channels")
        axes.set_xlabel("base of RoPE")
    panels[0].set_ylabel("tokens")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    ticks = MaxNLocator(7, steps=(1, 2, 5, 10))
    bar = figure.colorbar(panels[0].collections[0], ax=panels, label=label, pad=0.01, ticks=ticks, format="{x:g}")
    bar.minorticks_off()
    return figure


def _theory(axes: Axes, own: Sequence[Base], trained: int, lengths: Sequence[int]) -> None:
    x = [base.base for base in own]
    axes.axhline(trained, **REFERENCE_LINE, label="training length")
    axes.plot(x, [base.extrapolation_bound for base in own], "o-", color="#D55E00", label="T_extra (Liu et al.)")
    axes.plot(x, [base.attended for base in own], "s-", color="black", label="B_m ≥ 0 up to here (Men et al.)")
    for i, base in enumerate((own[0].quarter_turn, own[0].half_turn, own[0].whole_turn)):
        label = "every pair turns by π/2, π, 2π" if i == 0 else None
        axes.axvline(base, color="#CC79A7", linewidth=0.9, linestyle=":", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_yticks(lengths, labels=[str(length) for length in lengths])
    axes.yaxis.set_minor_locator(NullLocator())
    low, *_, high = _edges(lengths)
    axes.set_ylim(low, high)
    axes.grid(visible=False)


def _edges(centres: Sequence[float]) -> np.ndarray:
    """The edges of cells with these centres, on a logarithmic axis."""
    logs = np.log(np.asarray(centres, np.float64))
    if len(logs) == 1:
        return np.exp([logs[0] - 0.5, logs[0] + 0.5])
    middles = (logs[1:] + logs[:-1]) / 2
    return np.exp([2 * logs[0] - middles[0], *middles, 2 * logs[-1] - middles[-1]])


def values(results: Sequence[Result], metric: str) -> Mapping[tuple[str, int], float | None]:
    """The values without a scaling rule, by variant and length."""
    return {
        (row.encoding, row.eval_length): row.value for row in results if row.metric == metric and row.scaling == "none"
    }


def findings(results: Sequence[Result], bases: Sequence[Base]) -> Iterator[str]:
    """Whether B_m >= 0 predicts the distances at which text is found again, by head width, and how exact the bound is.

    Yields nothing if copy_gain was not measured.
    """
    found = values(results, "copy_gain_bits_per_byte")
    if not found:
        return
    distances = sorted({distance for _, distance in found})
    for width in sorted({base.head_dim for base in bases}):
        counts = {(told, is_found): 0 for told in (True, False) for is_found in (True, False)}
        for base in (base for base in bases if base.head_dim == width):
            nearest = found.get((base.variant, distances[0])) or 0.0
            for distance in distances[1:]:
                gain = found.get((base.variant, distance))
                if gain is not None:
                    counts[distance <= base.attended, gain >= FOUND * nearest] += 1
        right, all_cells = counts[True, True] + counts[False, False], sum(counts.values())
        yield (
            f"Heads of {width} channels: of {all_cells} pairs of base and distance, B_m ≥ 0 up to the distance tells "
            f"{right} right, text counting as found where the drop is at least {FOUND:.0%} of that at {distances[0]} "
            f"tokens. It holds, and text is found: {counts[True, True]}; holds, not found: {counts[True, False]}; "
            f"fails, found all the same: {counts[False, True]}; fails, not found: {counts[False, False]}"
        )
    if bases:
        yield BOUND_READING
