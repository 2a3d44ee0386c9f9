"""Measures weak scaling of the training step over CPU devices: each device has the same number of rows of a batch.

    python -m benchmarks.weak_scaling                                   1, 2, 4 and 8 devices, at the default size
    python -m benchmarks.weak_scaling --size=smoke --fsdp               also shard kernels and moments

Each number of devices runs in a separate process. The devices share the cores of the CPU. Once all cores are busy, the
step time therefore grows at least in proportion to the number of rows.

`efficiency` is (step time on one device) x (number of devices) / (step time on all devices). A value below 1 is the
cost of sharding: communication, and more and smaller operations. A value above 1 means that one device left cores idle.

Times are the minimum of --blocks blocks. They are unreliable on a busy machine; see the load average.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posenc_jax import command

DEVICES = (1, 2, 4, 8)
OUTPUT = Path("experiments/results/benchmarks/weak_scaling.csv")


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    alone = None
    for devices in DEVICES:
        own = in_process(args, devices)
        alone = alone or own["step_seconds"]
        yield {
            "size": args.size,
            "devices": devices,
            "mesh": f"fsdp={devices}" if args.fsdp else f"data={devices}",
            "rows": args.rows * devices,
            "step_seconds": round(own["step_seconds"], 4),
            "time_to_one_device": round(own["step_seconds"] / alone, 2),
            "efficiency": round(alone * devices / own["step_seconds"], 2),
            "cores": os.cpu_count(),
            "load_average": own["load_average"],
        }


def in_process(args: argparse.Namespace, devices: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.weak_scaling", f"--size={args.size}", f"--rows={args.rows}"]
    command += [f"--blocks={args.blocks}", f"--measure={devices}", *(["--fsdp"] if args.fsdp else [])]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, devices: int) -> dict[str, Any]:
    """Measure in this process, in which `devices` devices are visible."""
    from benchmarks.alternate import alternate, load_average
    from benchmarks.step import training_step
    from configs import rope_extrap
    from posenc_jax.distributed.environment import keep_freed_memory

    keep_freed_memory()
    recipe: Any = rope_extrap.get_config(f"size={args.size}")
    recipe.training.batch_size = args.rows * devices
    recipe.sharding.fsdp = devices if args.fsdp else 1
    step = training_step(recipe)
    step.run()
    times = alternate({"step": step.run}, blocks=args.blocks, calls=3)["step"]
    return {"step_seconds": min(times.wall), "load_average": load_average()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="default", help="a size of configs/rope_extrap.py")
    parser.add_argument("--rows", type=command.count, default=4, help="rows per device")
    parser.add_argument("--blocks", type=command.count, default=5, help="number of blocks of three steps")
    parser.add_argument("--fsdp", action="store_true", help="shard kernels as well as rows")
    parser.add_argument("--output", type=Path, help=f"path of a CSV file, e.g. {OUTPUT}")
    parser.add_argument("--measure", type=command.count, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args, args.measure)))
        return
    from benchmarks.tables import show, write

    measured = show(rows(args))
    if args.output:
        write(args.output, measured)


if __name__ == "__main__":
    command.run(main)
