"""The training costs of encodings, from the table that `python -m benchmarks encodings` writes."""

import csv
from collections.abc import Mapping
from pathlib import Path

from posenc_jax.reporting.tables import Table, text_table

COLUMNS = {
    "parameters_added": "parameters added",
    "step_time_to_none": "time of a step, none: 1",
    "temporary_mib": "memory of a step (MiB)",
    "compile_seconds": "compilation (s)",
}
Costs = Mapping[str, Mapping[str, str]]  # by encoding, then by column of the benchmark's table


def read_costs(path: Path) -> Costs:
    """The rows of the benchmark's table, by encoding."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["encoding"]: row for row in csv.DictReader(file)}


def costs_table(costs: Costs) -> Table:
    """A table of costs with one row per encoding."""
    rows = [(name, *(row[column] for column in COLUMNS)) for name, row in costs.items()]
    return text_table(("encoding", *COLUMNS.values()), rows)
