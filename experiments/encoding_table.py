"""Every encoding trained alike: how each reads past the training length and what it costs, in one table.

    python -m experiments.encoding_table                        all encodings, one after another
    python -m experiments.encoding_table rope alibi --runs=runs/table

Each is a run of `configs/rope_extrap.py:encoding=NAME` without scaling rules, in a folder of its own, so that the same
command goes on after an interruption and adds encodings that are new. Writes results.csv and report.md, with the
figure, to --output; intervals are over documents, of one seed. The costs are those of --costs, a table that
`python -m benchmarks encodings` measured.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from posenc_jax import command, encodings
from posenc_jax.catalogue import Facts
from posenc_jax.files import replace_text
from posenc_jax.reporting import figures
from posenc_jax.reporting.encoding_costs import Costs, read_costs
from posenc_jax.reporting.tables import Cell, Table, extrapolation_table, format_value
from posenc_jax.results import METRICS, Result, by_curve, read_results, train_length, write_results

SHOWN = ("prefix_bits_per_byte", "tail_bits_per_byte", "context_gain_bits_per_byte")
COSTS = {"parameters_added": "parameters", "step_time_to_none": "step time", "compile_seconds": "compile (s)"}
READING = (
    "Bits per byte over windows of each length (`prefix`, lower is better), and what context past the training length "
    "is worth at the end of the window (`gain`: positive where the model uses it, negative where it breaks). "
    "Parameters, and the time of a training step at a context of 1,024 tokens, are beside those of none, whose own "
    "time, measured again, shows the noise; compile time includes tracing."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=encodings.names(), help="encodings; default: all")
    parser.add_argument("--size", default="default")
    parser.add_argument("--runs", type=Path, default=Path("runs/encoding_table"))
    parser.add_argument("--costs", type=Path, default=Path("experiments/results/benchmarks/encodings.csv"))
    parser.add_argument("--output", type=Path, default=Path("experiments/results/encoding_table"))
    args = parser.parse_args()
    results: list[Result] = []
    families: dict[str, list[Result]] = {}
    for name in args.names:
        encodings.schema(name)  # an unknown one ends it here
        workdir = args.runs / name
        rows = run_recipe(f"configs/rope_extrap.py:size={args.size},encoding={name}", workdir)
        results += rows
        families.setdefault(family(name), []).extend(rows)
    (args.output / "figures").mkdir(parents=True, exist_ok=True)
    write_results(args.output / "results.csv", results)
    figures.save(figures.extrapolation_panels(families), args.output / "figures" / "extrapolation")
    short = summary(results, read_costs(args.costs))
    sections = [
        "# Every encoding, trained alike",
        f"## In short\n\n{READING}\n\n{short.markdown()}".rstrip(),
        "![Bits per byte over length](figures/extrapolation.png)",
    ]
    for metric in SHOWN:
        table = extrapolation_table(results, metric)
        sections.append(f"## {table.title}\n\n{METRICS[metric].reading}\n\n{table.markdown()}".rstrip())
    made = f"- git revision: {revisions(args.runs / name for name in args.names)}"
    sections.append(f"## How it was made\n\n    python -m experiments.encoding_table\n\n{made}")
    replace_text(args.output / "report.md", "\n\n".join(sections) + "\n")
    print(f"report: {args.output / 'report.md'}")


def run_recipe(recipe: str, workdir: Path) -> list[Result]:
    """The results of a recipe without scaling rules, from its workdir once it is complete; exits as the run does."""
    scalings = "--config.evaluation.rope_scalings=('none',)"
    arguments = [sys.executable, "launch.py", f"--config={recipe}", scalings, f"--workdir={workdir}"]
    print(f"{workdir.name}: {' '.join(arguments[1:])}", flush=True)
    ran = subprocess.run(arguments, check=False)
    if ran.returncode:
        sys.exit(ran.returncode)
    return read_results(workdir / "results.csv")


def revisions(workdirs: Iterable[Path]) -> str:
    """The git revisions that runs were made at, of those that are there."""
    records = (path / "config.json" for path in workdirs)
    found = (json.loads(path.read_text(encoding="utf-8"))["git_revision"] for path in records if path.exists())
    return "; ".join(dict.fromkeys(revision or "unknown" for revision in found))


def family(name: str) -> str:
    """Where an encoding acts, and whether it looks at the content of tokens to do so."""
    facts = Facts.of(name)
    if facts.acts_on in ("nothing", "embeddings"):
        return "none, or added to embeddings"
    if facts.acts_on == "queries and keys":
        return "queries and keys"
    return "logits, by content" if facts.data_dependent or facts.acts_on == "weights" else "logits, by position"


def summary(results: Sequence[Result], costs: Costs) -> Table:
    """One row per encoding: the loss at each length from training's on, the gain past it, and the costs."""
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
    return Table("Every encoding, trained alike", shown, tuple(tuple(map(Cell, row)) for row in rows))


if __name__ == "__main__":
    command.run(main)
