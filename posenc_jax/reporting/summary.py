"""The short table of a study: one row per curve, with its losses, its context gains and its costs."""

from collections.abc import Sequence

from posenc_jax.reporting.encoding_costs import Costs
from posenc_jax.reporting.tables import Cell, Table, format_value
from posenc_jax.results import Result, by_curve, train_length

COSTS = {"parameters_added": "parameters", "step_time_to_none": "step time", "compile_seconds": "compile (s)"}
READING = (
    "Bits per byte over windows of each length (lower is better), and the gain: what context past the training length "
    "is worth at the end of the window, positive where the model uses it, negative where it breaks."
)
COSTS_READING = (
    "Parameters, and the time of a training step at a context of 1,024 tokens, are beside those of none, whose own "
    "time, measured again, shows the noise; compile time includes tracing."
)


def summary(results: Sequence[Result], costs: Costs) -> Table:
    """The loss at each length from the training length on, the gain at each longer length, and the costs if any."""
    unit = train_length(results)
    losses, gains = (by_curve(results, metric) for metric in ("prefix_bits_per_byte", "context_gain_bits_per_byte"))
    lengths = sorted({length for rows in losses.values() for length in rows if length >= unit})
    header = [f"{length / unit:.3g}x" for length in lengths] + [f"gain {length / unit:.3g}x" for length in lengths[1:]]
    rows = []
    for name in losses:
        cells = [losses[name].get(length) for length in lengths]
        cells += [gains.get(name, {}).get(length) for length in lengths[1:]]
        texts = ["" if cell is None or cell.value is None else format_value(cell).split(" ")[0] for cell in cells]
        rows.append((name, *texts, *(costs.get(name, {}).get(cost, "") for cost in COSTS if costs)))
    shown = ("encoding", *header, *(COSTS.values() if costs else ()))
    return Table("In short", shown, tuple(tuple(map(Cell, row)) for row in rows))
