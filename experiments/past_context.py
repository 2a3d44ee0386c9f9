"""The figure and the table of a model past its context, from runs of experiments/pretrained_extension.py.

python -m experiments.past_context runs/A runs/B --output=runs/past_context.png
python -m experiments.past_context                          the committed runs, of which README.md has the figure

Losses are pooled over the windows of all runs without retrieval tasks. These runs must have the same rules and lengths,
and each has a text of its own. Answers are pooled over the runs with retrieval tasks.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from posenc_jax import command
from posenc_jax.config import RunConfig
from posenc_jax.encodings.rope_theory import attended_distance
from posenc_jax.evaluation.run_results import effective_lengths, result_rows
from posenc_jax.evaluation.window_sums import Key, Recall, Sums, WindowSums, read_sums
from posenc_jax.reporting import recall_figures
from posenc_jax.reporting.figures import GREY, REFERENCE_LINE, STYLE, WIDTH, label_ends, styles
from posenc_jax.reporting.tables import Cell, Table, effective_length_cell, format_value
from posenc_jax.results import Result, by_curve, curve_names, train_length
from posenc_jax.runs import trained
from posenc_jax.schema import ConfigError

RESULTS = Path(__file__).parent / "results" / "pretrained_extension"
BIN = 1024  # tokens for each point of the loss by position
BY_POSITION = "by_position_bits_per_byte"


def committed(root: Path = RESULTS) -> list[Path]:
    """The folders of the committed runs."""
    return sorted(path.parent for path in root.glob("*/windows.npz"))


def pooled(folders: Sequence[Path]) -> tuple[RunConfig, list[Result]]:
    """The settings of the first run with losses, and the results of all runs together.

    Documents of different runs are different, so intervals of losses are over the documents of all texts. Raises
    ConfigError if the runs do not belong together, and what `read_sums` raises.
    """
    first: RunConfig | None = None
    losses: list[tuple[RunConfig, WindowSums]] = []
    documents: list[str] = []
    asked: dict[Key, list[Recall]] = {}
    asking: RunConfig | None = None  # the first run with retrieval tasks
    for folder in folders:
        config = trained.read_config(folder)
        if not (folder / "windows.npz").exists():
            raise ConfigError("FOLDER", str(folder), "must be the folder of a complete run")
        sums, own, _ = read_sums(folder / "windows.npz", config)
        first = first or config
        _check_same(folder, config, first, ("init_sha256", "pretrained_length"))
        if config.evaluation.retrieval_tasks:
            asking = asking or config
            _check_same(folder, config.evaluation, asking.evaluation, ("retrieval_depths",))
            for key, recall in sums.items():
                if isinstance(recall, Recall):
                    asked.setdefault(key, []).append(recall)
            continue
        if losses:
            _check_same(folder, config.evaluation, losses[0][0].evaluation, ("lengths", "rope_scalings", "tail"))
        losses.append((config, sums))
        documents += [f"{folder.name}: {document}" for document in own]
    if not losses:
        raise ConfigError("FOLDER", ", ".join(map(str, folders)), "must include a run without retrieval tasks")
    config = losses[0][0]
    results = result_rows(config, _binned(_concatenated([sums for _, sums in losses])), documents)
    if asking:
        answers = {key: Recall(*map(np.concatenate, zip(*own, strict=True))) for key, own in asked.items()}
        evaluation = dataclasses.replace(config.evaluation, retrieval_depths=asking.evaluation.retrieval_depths)
        rows = result_rows(dataclasses.replace(config, evaluation=evaluation), answers, documents)
        results += [row for row in rows if row.metric != "effective_length"]  # which needs the losses too
    return config, results + effective_lengths(results)


def table(results: Sequence[Result]) -> Table:
    """One row for each rule: losses at the longest length, the passkey past the training length, effective length."""
    trained_on = train_length(results)
    losses = by_curve(results, "prefix_bits_per_byte")
    longest = max(length for own in losses.values() for length in own)
    columns = {
        f"prefix, {longest:,}": ("prefix_bits_per_byte", longest),
        "minus none": ("prefix_change_bits_per_byte", longest),
        "context_gain": ("context_gain_bits_per_byte", longest),
        "LongPPL": ("long_perplexity", longest),
    }
    recalls = by_curve(results, "passkey_recall")
    for length in sorted({length for own in recalls.values() for length in own if length >= trained_on}):
        columns[f"passkey, {length:,}"] = "passkey_recall", length
    effective = by_curve(results, "effective_length")
    found = {metric: by_curve(results, metric) for metric, _ in columns.values()}
    rows = []
    for name in losses:
        cells = [_cell(found[metric].get(name, {}).get(length)) for metric, length in columns.values()]
        if recalls:
            cells.append(effective_length_cell(*effective.get(name, {}).values()))
        rows.append((Cell(name), *cells))
    return Table("", ("rule", *columns, *(["effective length"] if recalls else [])), tuple(rows))


@matplotlib.rc_context(STYLE)
def figure(results: Sequence[Result], config: RunConfig) -> Figure:
    """The loss by position, one line per rule, above the heat maps of the passkey."""
    has_recall = bool(recall_figures.depths_of(results, "passkey"))
    whole = Figure(figsize=(WIDTH, 3.4 + 3.0 * has_recall), layout="constrained")
    top, *below = whole.subfigures(1 + has_recall, 1, height_ratios=(3.4, 3.0)[: 1 + has_recall], squeeze=False).ravel()
    axes = top.subplots()
    _draw_losses(axes, results)
    _mark(axes, train_length(results), "trained on {:,}", "left")
    base = getattr(config.encoding.hyperparameters, "base", None)
    if base is not None:  # RoPE
        longest = int(axes.get_xlim()[1])
        bound = attended_distance(config.model.head_dim, base, longest)
        if bound < longest:
            _mark(axes, bound, "bound of Men et al.: {:,}", "right")
    if has_recall:
        below[0].suptitle("Passkey: right answers of all, by length of the text and depth", size=9, x=0.02, ha="left")
        shown = [dataclasses.replace(row, scaling=row.scaling.partition(":")[0]) for row in results]
        recall_figures.draw_grid(below[0], shown, "passkey", columns=5)
    return whole


def _draw_losses(axes: Axes, results: Sequence[Result]) -> None:
    style = dict(zip(curve_names(results).values(), styles(), strict=False))
    for name, rows in by_curve(results, BY_POSITION).items():
        edges = np.array([0, *rows])
        values = [row.value for row in rows.values()]
        axes.plot((edges[:-1] + edges[1:]) / 2, values, markevery=4, label=name.partition(":")[0], **style[name])
        axes.set_xlim(0, edges[-1])
    axes.set_xticks(np.arange(0, axes.get_xlim()[1] + 1, train_length(results) / 4))
    axes.set_xlabel("position in the window (tokens)")
    axes.set_ylabel("bits per byte")
    label_ends(axes)


def _mark(axes: Axes, length: int, text: str, side: str) -> None:
    """Mark a number of tokens by a line, with a text above it, whose `side` is at the line."""
    axes.axvline(length, **REFERENCE_LINE, zorder=1)
    place, above = axes.get_xaxis_transform(), (0, 2)
    axes.annotate(text.format(length), (length, 1), above, place, "offset points", ha=side, color=GREY)


def _cell(row: Result | None) -> Cell:
    if row is None or row.value is None:
        return Cell("")
    if row.metric == "passkey_recall":
        return Cell(f"{row.value * row.tokens:.0f}/{row.tokens}")
    return Cell(format_value(row))


def _concatenated(parts: Sequence[WindowSums]) -> WindowSums:
    """Sums over the windows of all parts. A part without a key has no tokens there."""
    whole: WindowSums = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        sums = [part.get(key) or _nothing(part) for part in parts]
        whole[key] = Sums(*map(np.concatenate, zip(*sums, strict=True)))
    return whole


def _nothing(part: WindowSums) -> Sums:
    return Sums(*np.zeros((3, len(next(iter(part.values())).nats))))


def _binned(measured: WindowSums) -> WindowSums:
    """The same with wider bins of the loss by position."""
    whole = {key: sums for key, sums in measured.items() if key.metric != "by_position"}
    for key, sums in measured.items():
        if key.metric == "by_position":
            wider = key._replace(length=-(-key.length // BIN) * BIN)
            whole[wider] = Sums(*(a + b for a, b in zip(whole[wider], sums, strict=True))) if wider in whole else sums
    return whole


def _check_same(folder: Path, own: object, first: object, names: Sequence[str]) -> None:
    for name in names:
        if getattr(own, name) != getattr(first, name):
            allowed = f"must be {getattr(first, name)!r}, as in the other runs"
            raise ConfigError(f"{name} of {folder}", getattr(own, name), allowed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of a complete run")
    parser.add_argument("--output", type=Path, default=Path("past_context.png"), help="default: past_context.png")
    args = parser.parse_args()
    config, results = pooled(args.folders or committed())
    table(results).print(Console())
    figure(results, config).savefig(args.output, dpi=200)


if __name__ == "__main__":
    command.run(main)
