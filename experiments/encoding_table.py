"""Every encoding trained alike: how each reads past the training length, in one table.

    python -m experiments.encoding_table                        all encodings, one after another
    python -m experiments.encoding_table rope alibi --runs=runs/table

Each is a run of `configs/rope_extrap.py:encoding=NAME` without scaling rules, in a folder of its own, so that the same
command goes on after an interruption and adds encodings that are new. Writes results.csv and report.md, with the
figure, to --output; intervals are over windows, of one seed.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from posenc_jax import encodings
from posenc_jax.reporting import figures
from posenc_jax.reporting.tables import METRICS, extrapolation_table, read_results, write_results

SHOWN = ("prefix_bits_per_byte", "tail_bits_per_byte", "context_gain_bits_per_byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=encodings.names(), help="encodings; default: all")
    parser.add_argument("--size", default="default")
    parser.add_argument("--runs", type=Path, default=Path("runs/encoding_table"))
    parser.add_argument("--output", type=Path, default=Path("experiments/results/encoding_table"))
    args = parser.parse_args()
    results = []
    for name in args.names:
        encodings.schema(name)  # an unknown one ends it here
        workdir = args.runs / name
        recipe = f"--config=configs/rope_extrap.py:size={args.size},encoding={name}"
        scalings = "--config.evaluation.scalings=('none',)"
        command = [sys.executable, "launch.py", recipe, scalings, f"--workdir={workdir}"]
        print(f"{name}: {' '.join(command[1:])}", flush=True)
        ran = subprocess.run(command, check=False)
        if ran.returncode:
            sys.exit(ran.returncode)
        results += read_results(workdir / "results.csv")
    (args.output / "figures").mkdir(parents=True, exist_ok=True)
    write_results(args.output / "results.csv", results)
    figures.save(figures.extrapolation_curve(results), args.output / "figures" / "extrapolation")
    sections = ["# Every encoding, trained alike", "![Bits per byte over length](figures/extrapolation.png)"]
    for metric in SHOWN:
        table = extrapolation_table(results, metric)
        sections.append(f"## {table.title}\n\n{METRICS[metric].reading}\n\n{table.markdown()}".rstrip())
    (args.output / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"report: {args.output / 'report.md'}")


if __name__ == "__main__":
    main()
