"""Compiles training for TPUs without having one, and reports whether it fits and how much the devices communicate.

    pip install -r requirements.txt "jax[tpu]"            in a separate virtual environment; no TPU is needed
    python -m benchmarks.topologies                       all cases; an hour on two cores
    python -m benchmarks.topologies v5e-1 --sizes small   the cases of one topology and some sizes
    python -m benchmarks.topologies cpu-8                 a tiny model on eight CPU devices, without libtpu

Each case is a size of configs/rope_extrap.py with one mesh, and one of three programs:

- training: the program of the training loop, with all settings of the recipe;
- scoring: the scoring of windows of the longest evaluation length, while the training state is also in memory;
- members: a stack of runs of experiments/rope_base.py.

The table contains:

- the memory of one device according to the compiler: arguments (parameters and moments), temporaries, and the total;
- the communication for each kind of collective: the MiB per device and step (for scoring: per batch), and the number
  of collectives. Each collective counts the larger of its input and its output.
- the compiler's message, which says by how much the program exceeds the memory, if the program does not fit.

The rows of the selected cases replace those in the existing table. All other rows stay.
"""

import argparse
import csv
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # do not use a TPU even if there is one
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu queries a metadata server over the network
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies

from benchmarks.collectives import KINDS, exchanged
from benchmarks.tables import show, write
from configs import rope_extrap
from experiments import rope_base
from posenc_jax import command
from posenc_jax.config import RunConfig
from posenc_jax.data.tokenizers import ByteTokenizer
from posenc_jax.data.tokens import Dataset, Split
from posenc_jax.distributed import sharding
from posenc_jax.runs.grid import Study
from posenc_jax.runs.program import Program, Stack, groups
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.objectives import token_losses
from posenc_jax.training.step import abstract_model, abstract_state

OUTPUT = Path("experiments/results/benchmarks/topologies.csv")
ONE_CHIP = {"chips_per_host_bounds": [1, 1, 1]}


@dataclasses.dataclass(frozen=True)
class Chips:
    """A topology. `name` and `options` are the arguments for libtpu; the name "" means CPU devices."""

    name: str
    hbm_gib: float  # memory of one JAX device that the compiler lets a program use
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


TOPOLOGIES = {
    "v5e-1": Chips("v5e:1x1", 15.75, ONE_CHIP),
    "v6e-1": Chips("v6e:1x1", 31.25, ONE_CHIP),
    "v5e-8": Chips("v5e:2x4", 15.75),
    "v5p-64": Chips("v5p:4x4x2", 95),  # 64 cores on 32 chips
    "cpu-8": Chips("", 16),
}


@dataclasses.dataclass(frozen=True)
class Case:
    topology: str
    size: str
    fsdp: int = 1
    tensor: int = 1
    grad_accum_steps: int | None = None  # default: that of the recipe, with which 64 devices get less than one row each
    program: str = "training"  # or "scoring", "members"


CASES = (
    *(Case("v5e-1", size) for size in ("smoke", "default", "small", "base")),
    *(Case("v5e-1", size, program="scoring") for size in ("small", "base")),
    Case("v6e-1", "small"),
    Case("v5e-8", "small"),
    *(Case("v5e-8", "base", *axes) for axes in ((1, 1), (8, 1), (4, 2))),
    *(Case("v5e-8", size, program="members") for size in ("default", "small")),
    *(Case("v5p-64", "base", *axes, grad_accum_steps=1) for axes in ((1, 1), (8, 1))),
)
ON_CPU = (Case("cpu-8", "smoke"), Case("cpu-8", "smoke", fsdp=8), Case("cpu-8", "smoke", program="members"))


def rows(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    for case in cases:
        chips = TOPOLOGIES[case.topology]
        devices = devices_of(chips)
        begun = time.perf_counter()
        try:
            compiled, problem = PROGRAMS[case.program](case, devices), ""
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled, problem = None, next(line for line in str(error).splitlines() if "hbm" in line.lower())
        row = {
            "topology": case.topology,
            "devices": len(devices),
            "size": case.size,
            "program": case.program,
            "mesh": mesh_shape(case, len(devices)),
            "fits": "no",
            "memory_mib": "",
            "arguments_mib": "",
            "temporaries_mib": "",
            **dict.fromkeys(KINDS, ""),
            "compile_seconds": round(time.perf_counter() - begun),
            "jax": jax.__version__,
            "compiler": problem,
        }
        if compiled is not None:
            usage = compiled.memory_analysis()
            needed = usage.argument_size_in_bytes + usage.temp_size_in_bytes
            needed += usage.output_size_in_bytes - usage.alias_size_in_bytes
            found = exchanged(compiled.as_text())
            row |= {
                "fits": "yes" if needed <= chips.hbm_gib * 2**30 else "no",
                "memory_mib": round(needed / 2**20),
                "arguments_mib": round(usage.argument_size_in_bytes / 2**20),
                "temporaries_mib": round(usage.temp_size_in_bytes / 2**20),
                **{kind: f"{found[kind].bytes / 2**20:.4g} in {found[kind].count}" for kind in KINDS if kind in found},
            }
        yield row


def devices_of(chips: Chips) -> list[Any]:
    """The devices of a topology, which need not exist, or the CPU devices. Exits with code 2 if libtpu is missing."""
    if not chips.name:
        return jax.devices("cpu")
    try:
        return list(topologies.get_topology_desc(chips.name, "tpu", **chips.options).devices)
    except (jax.errors.JaxRuntimeError, ImportError, ValueError, RuntimeError) as error:
        print(f'{chips.name}: {error}\nlibtpu is required: pip install "jax[tpu]=={jax.__version__}"', file=sys.stderr)
        raise SystemExit(2) from error


def mesh_shape(case: Case, devices: int) -> str:
    if case.program == "members":
        return f"members={devices}"
    shape = {"data": devices // (case.fsdp * case.tensor), "fsdp": case.fsdp, "tensor": case.tensor}
    return " ".join(f"{axis}={n}" for axis, n in shape.items() if n > 1) or "data=1"


def config_of(case: Case) -> RunConfig:
    recipe = rope_extrap.get_config(f"size={case.size}")
    recipe.sharding.fsdp, recipe.sharding.tensor = case.fsdp, case.tensor
    if case.grad_accum_steps:
        recipe.training.grad_accum_steps = case.grad_accum_steps
    return RunConfig.from_mapping(recipe.to_dict())


def training(case: Case, devices: Sequence[Any]) -> jax.stages.Compiled:
    config = config_of(case)
    mesh, state = placed_state(config, devices)
    of_run = config.training
    shape = (of_run.steps_per_dispatch, of_run.batch_size, of_run.length + 1)
    batches = sharding.abstract_rows(shape, mesh, axis=1)
    steps = Program(config, dataset(config), devices).single.train_steps(False)
    with jax.set_mesh(mesh):
        return steps.lower(state, batches, np.int32(0)).compile()


def scoring(case: Case, devices: Sequence[Any]) -> jax.stages.Compiled:
    config = config_of(case)
    mesh, state = placed_state(config, devices)
    graphdef, _ = abstract_model(config)
    longest = config.evaluation.lengths[-1]
    batch = sharding.abstract_rows((config.evaluation.batch_tokens // longest, longest + 1), mesh)

    def losses(state, tokens):
        return token_losses(nnx.merge(graphdef, state["params"], state["constants"]), tokens)

    with jax.set_mesh(mesh):
        return jax.jit(losses, keep_unused=True).lower(state, batch).compile()  # so that moments count as memory


def members(case: Case, devices: Sequence[Any]) -> jax.stages.Compiled:
    study = Study.from_mapping(rope_base.get_config(f"size={case.size}").to_dict())
    group = max(groups(study.runs), key=len)
    config = group[0].config
    mesh = sharding.make_stack_mesh(len(group), len(devices), devices, parallel_runs=len(devices))
    program, size = Program(config, dataset(config), devices), -(-len(group) // len(devices)) * len(devices)
    return Stack(program, size, mesh, vectorized=True).train_steps(False)


PROGRAMS: dict[str, Callable[[Case, Sequence[Any]], jax.stages.Compiled]] = {
    "training": training,
    "scoring": scoring,
    "members": members,
}


def placed_state(config: RunConfig, devices: Sequence[Any]) -> tuple[jax.sharding.Mesh, Any]:
    """The mesh of a run on these devices, and its abstract state with shardings."""
    parts = config.training.batch_size // config.training.grad_accum_steps
    mesh = sharding.make_mesh(parts, devices, fsdp=config.sharding.fsdp, tensor=config.sharding.tensor)
    return mesh, abstract_state(config, optimizers.build(config.optimizer, total_steps=1000, warmup_steps=10), mesh)


def dataset(config: RunConfig) -> Dataset:
    """A dataset of zeros with the minimum length, and the vocabulary of the run."""
    size = 4 * config.training.length
    split = Split("train", np.zeros(size, np.uint16), np.array([0, size]), ("zeros",), size)
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes = np.ones(config.data.vocab_size, np.int32)  # all that programs look at
    return Dataset("zeros", "0", tokenizer, {"train": split})


def written(path: Path, measured: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows, of which each is in the table before the next is measured."""

    def case(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(row[name] for name in ("topology", "size", "program", "mesh"))

    table = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            table = {case(row): row for row in csv.DictReader(file)}
    for row in measured:
        table[case(row)] = row
        write(path, list(table.values()))
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "topologies", nargs="*", metavar="topology", help=f"one of {', '.join(TOPOLOGIES)}; default: all TPUs"
    )
    parser.add_argument("--sizes", nargs="+", help="sizes of configs/rope_extrap.py; default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"path of the table; default: {OUTPUT}")
    args = parser.parse_args()
    if unknown := set(args.topologies) - set(TOPOLOGIES):
        parser.error(f"unknown topology {min(unknown)!r}; must be one of: {', '.join(TOPOLOGIES)}")
    cases = [
        case
        for case in (*CASES, *ON_CPU)
        if (case.topology in args.topologies or (not args.topologies and case in CASES))
        and (args.sizes is None or case.size in args.sizes)
    ]
    if not cases:
        parser.error("there is no case with these topologies and sizes")
    if "cpu-8" in args.topologies:
        jax.config.update("jax_num_cpu_devices", 8)
    show(written(args.output, rows(cases)))


if __name__ == "__main__":
    command.run(main)
