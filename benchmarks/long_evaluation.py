"""Measures the time and memory to evaluate one long window, from 4,096 to 65,536 tokens, with 8 heads.

    python -m benchmarks.long_evaluation                       alibi, t5, fire, fox and rope
    python -m benchmarks.long_evaluation cope --longest=8192

The benchmark computes the losses of all tokens of a window, as evaluation does, with an untrained model of 2 layers and
width 512. Each encoding and length runs in a separate process.

- `peak_mib` is the peak memory of the process minus its memory after the model was built. It includes the memory of the
  compiler.
- `seconds` is the time of the second call. Above 16,384 tokens, it is the time of the first call, which includes about
  one second of compilation.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from benchmarks.alternate import alternate, load_average
from benchmarks.tables import show
from configs import base
from experiments.recurrence import figures as growth_figures
from posenc_jax import command, encodings
from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.distributed.environment import keep_freed_memory
from posenc_jax.encodings.base import Constant
from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.training.step import build_model

WARMED_UP_TO = 16384  # tokens; the maximum length with a warm-up call
NAMES = ("alibi", "t5", "fire", "fox", "rope")


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    yield from compare(("rope",) if quick else NAMES, *((64, 128) if quick else (4096, 65536)))


def compare(names: Sequence[str], shortest: int, longest: int) -> Iterator[dict[str, Any]]:
    """A row for each encoding and length, each measured in a separate process."""
    for name in names:
        length = shortest
        while length <= longest:
            command = [sys.executable, "-m", "benchmarks.long_evaluation", name, f"--here={length}"]
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
            if ran.returncode:
                sys.exit(ran.returncode)
            yield json.loads(ran.stdout)
            length *= 2


def measure(name: str, length: int) -> dict[str, Any]:
    """The row of one encoding and length, measured in this process."""
    recipe = base.get_config()
    recipe.encoding = base.encoding(name)
    model = recipe.model
    model.num_layers, model.d_model, model.d_ff = 2, 512, 1408
    model.num_heads, model.num_kv_heads = 8, 8
    config = RunConfig.from_mapping(recipe.to_dict())
    graphdef, params, constants = nnx.split(build_model(config, jax.numpy.uint32(0)), nnx.Param, Constant)
    arrays = jax.block_until_ready((nnx.to_pure_dict(params), nnx.to_pure_dict(constants)))
    scorer = Scorer(graphdef, sharding.make_mesh(config.training.batch_size), batch_tokens=1)
    window = np.random.default_rng(0).integers(0, 256, (1, length + 1), dtype=np.int32)
    held = peak_bytes()
    if length <= WARMED_UP_TO:
        scorer(*arrays, window)
    times = alternate({name: lambda: scorer(*arrays, window)}, blocks=1, calls=1)[name]
    return {
        "encoding": name,
        "length": length,
        "seconds": round(times.wall[0], 3),
        "processor_seconds": round(times.processor[0], 3),
        "peak_mib": round((peak_bytes() - held) / 2**20),
        "load_average": load_average(),
    }


def peak_bytes() -> int:
    """The peak memory of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def figures(measured: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Time and memory against length, each with its growth exponent over the longer half of the lengths."""
    found = {}
    for quantity, label in (("seconds", "seconds"), ("peak_mib", "peak memory (MiB)")):
        curves: dict[str, dict[int, float]] = {}
        for row in measured:
            curves.setdefault(row["encoding"], {})[int(row["length"])] = max(float(row[quantity]), 1e-3)
        powers = {}
        for name, curve in curves.items():
            long = list(curve.items())[len(curve) // 2 :]
            (first, low), (last, high) = long[0], long[-1]
            powers[name] = float(np.log(high / low) / np.log(last / first)) if last > first else 0.0
        title = "one window through the model"
        found[f"evaluation_{quantity}"] = growth_figures.growth({title: curves}, label, {title: powers})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="encodings")
    parser.add_argument("--shortest", type=command.count, default=4096, help="tokens")
    parser.add_argument("--longest", type=command.count, default=65536, help="tokens")
    parser.add_argument(
        "--here", type=command.count, help="measure one encoding at this length in this process, and print JSON"
    )
    args = parser.parse_args()
    for name in args.names:
        encodings.load(name)  # raises for an unknown name
    if args.here is None:
        show(compare(args.names, args.shortest, args.longest))
        return
    keep_freed_memory()  # the same allocator and devices as in launch.py
    training = base.get_config().training
    sharding.divide_cpu(training.cpu_devices, training.batch_size)
    print(json.dumps(measure(args.names[0], args.here)))


if __name__ == "__main__":
    command.run(main)
