"""The short table of a study, and the training costs of encodings, which `python -m benchmarks encodings` measures."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from posenc_jax.reporting.tables import Table, format_value, text_table
from posenc_jax.results import Result, by_curve, train_length

COSTS = {  # columns of the benchmark's table, and how a report names them
    "parameters_added": "parameters added",
    "step_time_to_none": "time of a step, none: 1",
    "temporary_mib": "memory of a step (MiB)",
    "compile_seconds": "compilation (s)",
}
SHORT_COSTS = {"parameters_added": "parameters", "step_time_to_none": "step time", "compile_seconds": "compile (s)"}
READING = (
    "Bits per byte over windows of each length (lower is better), and the gain: what context past the training length "
    "is worth at the end of the window, positive where the model uses it, negative where it breaks."
)
SHORT_COSTS_READING = (
    "Parameters, and the time of a training step at a context of 1,024 tokens, are beside those of none, whose own "
    "time, measured again, shows the noise; compile time includes tracing."
)


Costs = Mapping[str, Mapping[str, str]]  # by encoding, then by column of the benchmark's table


def read_costs(path: Path) -> Costs:
    """The rows of the benchmark's table, by encoding."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["encoding"]: row for row in csv.DictReader(file)}


def costs_table(costs: Costs) -> Table:
    """A table of costs with one row per encoding."""
    rows = [(name, *(row[column] for column in COSTS)) for name, row in costs.items()]
    return text_table(("encoding", *COSTS.values()), rows)


def summary(results: Sequence[Result], costs: Costs) -> Table:
    """A row per curve: its loss at each length from the training length on, its gains past it, and its costs if any."""
    unit = train_length(results)
    losses, gains = (by_curve(results, metric) for metric in ("prefix_bits_per_byte", "context_gain_bits_per_byte"))
    lengths = sorted({length for rows in losses.values() for length in rows if length >= unit})
    header = [f"{length / unit:.3g}x" for length in lengths] + [f"gain {length / unit:.3g}x" for length in lengths[1:]]
    rows = []
    for name in losses:
        cells = [losses[name].get(length) for length in lengths]
        cells += [gains.get(name, {}).get(length) for length in lengths[1:]]
        texts = ["" if cell is None or cell.value is None else format_value(cell).split(" ")[0] for cell in cells]
        rows.append((name, *texts, *(costs.get(name, {}).get(cost, "") for cost in SHORT_COSTS if costs)))
    shown = ("encoding", *header, *(SHORT_COSTS.values() if costs else ()))
    return text_table(shown, rows)
