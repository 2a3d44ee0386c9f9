"""Time and memory of reading one long window, from 4,096 to 65,536 tokens, with 8 heads.

    python -m benchmarks.long_evaluation                       alibi, t5, fire, fox and rope
    python -m benchmarks.long_evaluation cope --longest=8192

The losses of all tokens of a window, as evaluation scores them, by a new model of 2 layers of width 512. Each encoding
has a process of its own, in which lengths double: `peak_mib` is the most memory that this process has held so far,
beyond what it held when the model was made, so that the compiler's memory is in it; `seconds` are of a second call.
"""

import argparse
import csv
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
from posenc_jax import encodings
from posenc_jax.allocator import keep_freed_memory
from posenc_jax.config import RunConfig
from posenc_jax.encodings.base import Constant
from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.reporting import recurrence_figures
from posenc_jax.training import sharding
from posenc_jax.training.step import build_model

NAMES = ("alibi", "t5", "fire", "fox", "rope")


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    yield from compare(("rope",) if quick else NAMES, *((64, 128) if quick else (4096, 65536)))


def compare(names: Sequence[str], shortest: int, longest: int) -> Iterator[dict[str, Any]]:
    """Rows of each encoding, from a process of its own."""
    for name in names:
        command = [sys.executable, "-m", "benchmarks.long_evaluation", name, f"--shortest={shortest}"]
        command += [f"--longest={longest}", "--here"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
            assert process.stdout is not None
            yield from csv.DictReader(process.stdout)
        if process.returncode:
            sys.exit(process.returncode)


def measure(name: str, shortest: int, longest: int) -> Iterator[dict[str, Any]]:
    """Rows of one encoding, in this process."""
    recipe = base.get_config()
    recipe.encoding = base.encoding(name)
    model = recipe.model
    model.num_layers, model.d_model, model.d_ff = 2, 512, 1408
    model.num_heads, model.num_kv_heads = 8, 8
    config = RunConfig.from_mapping(recipe.to_dict())
    graphdef, params, constants = nnx.split(build_model(config, jax.numpy.uint32(0)), nnx.Param, Constant)
    arrays = jax.block_until_ready((nnx.to_pure_dict(params), nnx.to_pure_dict(constants)))
    scorer = Scorer(graphdef, sharding.make_mesh(config.training.batch_size), batch_tokens=1)
    held, length = peak_bytes(), shortest
    while length <= longest:
        window = np.random.default_rng(0).integers(0, 256, (1, length + 1), dtype=np.int32)
        assert np.isfinite(scorer(*arrays, window)).all()
        times = alternate({name: lambda window=window: scorer(*arrays, window)}, blocks=1, calls=1)[name]
        yield {
            "encoding": name,
            "length": length,
            "seconds": round(times.wall[0], 3),
            "processor_seconds": round(times.processor[0], 3),
            "peak_mib": round((peak_bytes() - held) / 2**20),
            "load_average": load_average(),
        }
        length *= 2


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def figures(measured: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Time and memory against length, each with its power of the length over the longer half."""
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
        found[f"evaluation_{quantity}"] = recurrence_figures.growth({title: curves}, label, {title: powers})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="encodings")
    parser.add_argument("--shortest", type=int, default=4096, help="tokens")
    parser.add_argument("--longest", type=int, default=65536)
    parser.add_argument("--here", action="store_true", help="one encoding, in this process, as CSV")
    args = parser.parse_args()
    for name in args.names:
        encodings.schema(name)  # an unknown one ends it here
    if not args.here:
        show(compare(args.names, args.shortest, args.longest))
        return
    keep_freed_memory()  # this and the devices as launch.py has them
    training = base.get_config().training
    sharding.divide_cpu(training.cpu_devices, training.batch_size)
    writer: csv.DictWriter | None = None
    for row in measure(args.names[0], args.shortest, args.longest):
        if writer is None:
            writer = csv.DictWriter(sys.stdout, row, lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
