"""Runs the speed and memory benchmarks one after another. Each part prints a table and writes a CSV file.

    pip install -r requirements-dev.txt && python -m benchmarks           all parts; about an hour on two cores
    python -m benchmarks training encodings --output=results              only these parts
    python -m benchmarks --quick                                          tiny sizes, to check that everything works

Programs that are compared run in alternating blocks in one process. Each row contains the load average, because ratios
are unreliable on a busy machine. Parts: {parts}.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import sys
from pathlib import Path

from posenc_jax import command
from posenc_jax.distributed.environment import keep_freed_memory

PARTS = {
    "training": "benchmarks.training_step",
    "encodings": "benchmarks.encodings",
    "evaluation": "benchmarks.long_evaluation",
    "members": "benchmarks.members",
}


def main() -> None:
    description = (__doc__ or "").replace("{parts}", ", ".join(PARTS))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument(
        "--output", type=Path, default=Path("experiments/results/benchmarks"), help="folder of the CSV files"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}; must be one of: {', '.join(PARTS)}")
    keep_freed_memory()  # the same allocator and devices as in launch.py
    import jax

    from benchmarks.tables import show, write
    from configs import base
    from posenc_jax.distributed import sharding
    from posenc_jax.reporting.figures import save

    sharding.divide_cpu(base.get_config().training.cpu_devices, rows=2)  # the smallest batch has 2 windows
    args.output.mkdir(parents=True, exist_ok=True)
    for part in args.parts or PARTS:
        module = importlib.import_module(PARTS[part])
        print(f"\n{part}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        measured = show(module.rows(quick=args.quick))
        write(args.output / f"{part}.csv", measured)
        for name, figure in getattr(module, "figures", lambda rows: {})(measured).items():
            save(figure, args.output / name)
    machine = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks {' '.join(sys.argv[1:])}".strip(),
        "device": f"{jax.devices()[0].device_kind} x{len(jax.devices())}, {os.cpu_count()} cores",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    record = args.output / "machine.json"
    machines = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    machines |= dict.fromkeys(args.parts or PARTS, machine)
    record.write_text(json.dumps(machines, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
