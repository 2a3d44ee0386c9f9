"""Measures the training cost of each encoding relative to `none`, in alternating blocks in one process.

    python -m benchmarks.encodings                  every encoding, at the default size
    python -m benchmarks.encodings rope alibi fire --length=1024 --batch=4 --output=costs.csv

Columns for each encoding:

- the attention algorithm at this length;
- the number of parameters that it adds to those of `none`;
- the seconds to trace and compile the training step;
- the wall-clock time of the step relative to `none`: the ratio to the adjacent block of `none`, median over blocks;
- the temporary memory of the step according to the compiler;
- the load average, because ratios are unreliable if other programs compete.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.alternate import alternate, load_average
from benchmarks.step import TrainingStep, training_step
from benchmarks.tables import show, write
from configs import base
from posenc_jax import command, encodings
from posenc_jax.attention.dispatch import accelerated, algorithm
from posenc_jax.catalogue import DIMS
from posenc_jax.distributed import sharding
from posenc_jax.distributed.environment import keep_freed_memory
from posenc_jax.encodings.base import CAUSAL, AttentionInputs


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    """Every encoding at a context length of 1,024 tokens."""
    names, length = (("rope", "t5"), 32) if quick else (encodings.names(), 1024)
    layers = 1 if quick else None
    yield from compare(names, length=length, batch=4, blocks=2 if quick else 5, steps=2, layers=layers)


def compare(
    names: Sequence[str], *, length: int, batch: int, blocks: int, steps: int, layers: int | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each encoding. A block has `steps` steps. `layers` are those of the default model by default."""
    none = of_encoding("none", length, batch, layers)
    none.run()
    for name in names:
        step = of_encoding(name, length, batch, layers)
        step.run()
        times = alternate({"none": none.run, "own": step.run}, blocks=blocks, calls=steps)
        yield {
            "encoding": name,
            "length": length,
            "attention": attention(name, length, batch),
            "parameters_added": step.parameters - none.parameters,
            "compile_seconds": round(step.compile_seconds, 2),
            "step_time_to_none": round(times["own"].relative_to(times["none"]), 3),
            "temporary_mib": round(step.temporary_bytes / 2**20),
            "load_average": load_average(),
        }


def attention(name: str, length: int, batch: int) -> str:
    """The attention algorithm that the default model uses on this device."""
    encoding = encodings.build(name, DIMS, nnx.Rngs(0))
    positions = jnp.arange(length)[None]
    q, k = (jnp.zeros((batch, length, heads, DIMS.head_dim)) for heads in (DIMS.num_heads, DIMS.num_kv_heads))
    inputs = AttentionInputs(q, k, k, positions, positions)
    return (accelerated(encoding, inputs, CAUSAL) or algorithm(encoding, length)).__name__


def of_encoding(name: str, length: int, batch: int, layers: int | None = None) -> TrainingStep:
    """A training step of the default model with this encoding, or of its first `layers` layers."""
    recipe = base.get_config()
    recipe.model.num_layers = layers or recipe.model.num_layers
    recipe.encoding = base.encoding(name)
    recipe.training.length, recipe.training.batch_size = length, batch
    recipe.evaluation.tail = 2
    return training_step(recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=encodings.names(), help="encodings; default: all")
    parser.add_argument("--length", type=command.count, default=256, help="context length in tokens")
    parser.add_argument("--batch", type=command.count, default=16)
    parser.add_argument("--blocks", type=command.count, default=5)
    parser.add_argument("--steps", type=command.count, default=3, help="steps in a block")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    for name in args.names:
        encodings.load(name)  # raises for an unknown name
    keep_freed_memory()  # the same allocator and devices as in launch.py
    sharding.divide_cpu(base.get_config().training.cpu_devices, args.batch)
    measured = show(compare(args.names, length=args.length, batch=args.batch, blocks=args.blocks, steps=args.steps))
    if args.output:
        write(args.output, measured)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind} x{len(jax.devices())}, {os.cpu_count()} cores")


if __name__ == "__main__":
    command.run(main)
