"""How arrays are sharded: which devices hold which part of a batch, and of each parameter."""

import functools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from posenc_jax.distributed import environment, hosts
from posenc_jax.schema import ConfigError

# The mesh axes that divide the dimensions of an array. The first pattern found in its path applies. Optimizer moments
# have the paths of their parameters. Adafactor's row and column means are divided by the first axis of the pattern,
# whichever dimension they are of, because they are small. Heads and hidden width are divided over "tensor", as in
# Megatron-LM (Shoeybi et al. 2019), and the other dimension over "fsdp", as in ZeRO-3 (Rajbhandari et al. 2020).
RULES = (
    (r"block_\d+/(attention/([qkv]|gate)|feed_forward/(gate|up))/kernel$", ("fsdp", "tensor")),
    (r"block_\d+/(attention/out|feed_forward/down)/kernel$", ("tensor", "fsdp")),
    (r"(^|/)embedding$", ("tensor", "fsdp")),
    (r"(^|/)(unembedding|head/hidden)/kernel$", ("fsdp", "tensor")),
    (r"encoding_\w+/(.*/)?(kernel|table)$", ("fsdp",)),
    (r"encoding_\w+/projection$", ("tensor", None, "fsdp")),  # heads x channels x width
    (r"", ()),
)


def divide_cpu(parts: int, rows: int) -> None:
    """Make JAX see the CPU as up to `parts` devices: at most one per core, and a number that divides `rows` evenly.

    The devices run their parts of a step in parallel, including operations for which XLA uses only one core. A number
    set by the environment (XLA_FLAGS or JAX_NUM_CPU_DEVICES) is kept. With several processes, each has this number of
    devices. Call it before a device is first used. Raises ConfigError if jax finds no devices.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        most = min(parts, os.cpu_count() or 1)
        number = max((n for n in range(1, most + 1) if rows % (n * hosts.count()) == 0), default=1)
        if jax.config.jax_num_cpu_devices < 1:  # type: ignore[attr-defined]  # the first run of a process sets it
            jax.config.update("jax_num_cpu_devices", number)
    environment.check_devices()


def make_mesh(rows: int, devices: Sequence[Any] | None = None, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of all devices, or those given, with axes "data", "fsdp" and "tensor". "data" gets the remaining factor.

    Raises ConfigError unless `fsdp` x `tensor` divides the number of devices, and "data" x "fsdp" divides `rows`.
    """
    devices = jax.devices() if devices is None else devices
    shape = _shape(rows, len(devices), fsdp, tensor)
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def _shape(rows: int, devices: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    if devices % tensor:
        raise ConfigError("config.sharding.tensor", tensor, f"must divide the {devices} devices")
    sharing = devices // tensor
    if sharing % fsdp:
        allowed = f"must divide the {sharing} devices that tensor = {tensor} leaves"
        raise ConfigError("config.sharding.fsdp", fsdp, allowed)
    if rows % sharing:
        field = "config.training.batch_size / grad_accum_steps"
        raise ConfigError(field, rows, f"must be a multiple of {sharing}, the number of devices that share rows")
    return sharing // fsdp, fsdp, tensor


def make_stack_mesh(
    count: int,
    rows: int,
    devices: Sequence[Any] | None = None,
    *,
    parallel_runs: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
    shares_rows: bool = True,
) -> Mesh:
    """A mesh for `count` runs of one program. Its axis "runs" divides the devices into parts.

    Each part has the axes of `make_mesh`. There are `parallel_runs` parts; 0 means as many as train all runs in the
    fewest rounds. The devices of a part share the rows of a batch. The axis "data" has size 1 if `shares_rows` is
    False. Devices that cannot share the rows evenly are not used.

    Raises ConfigError as `make_mesh` does, or if there are too few devices for `parallel_runs` parts.
    """
    devices = jax.devices() if devices is None else devices
    most = max(len(devices) // (fsdp * tensor), 1)
    if parallel_runs > most:
        allowed = f"must be at most {most}: there are {len(devices)} devices, of which a model needs {fsdp * tensor}"
        raise ConfigError("config.sharding.parallel_runs", parallel_runs, allowed)
    rounds = math.ceil(count / most)
    parts = min(parallel_runs, count) or math.ceil(count / rounds)
    sharing = range(most // parts if shares_rows else 1, 0, -1)
    data = next((n for n in sharing if rows % (n * fsdp) == 0), 1)
    shape = (parts, *_shape(rows, min(data * fsdp * tensor, len(devices)), fsdp, tensor))
    placed = np.array(devices[: math.prod(shape)]).reshape(shape)
    return Mesh(placed, ("runs", "data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 4)


@functools.cache
def forward_options() -> dict[str, str] | None:
    """The compiler options of `jax.jit` for a forward pass. On CPU, the layers then share their working memory.

    By default XLA orders the operations on CPU so that many can run at the same time, and the working memory grows with
    the number of layers. For 30 layers and 32,768 tokens it is six times as large, and the same bits take as long.
    """
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # jax 0.7 does not have this option
        return None
    return options


def sequence_mesh(mesh: Mesh) -> Mesh:
    """The devices of a mesh along one axis, "sequence", which divides the tokens of a window."""
    return Mesh(mesh.devices.flatten(), ("sequence",), axis_types=(AxisType.Auto,))


def placement(tree: Any, mesh: Mesh, *leading: str) -> Any:
    """The sharding of each array of a tree, by RULES. Only the shapes of the arrays are used.

    If `leading` axes are given, the sharding is for many such arrays, stacked along these axes. A dimension that its
    mesh axis does not divide evenly is not divided.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next(axes for pattern, axes in RULES if re.search(pattern, name))
        pairs = zip(axes, leaf.shape, strict=False)
        divided = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in pairs)
        return NamedSharding(mesh, PartitionSpec(*leading, *divided))

    return jax.tree_util.tree_map_with_path(place, tree)


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh that divide the rows of a batch."""
    return tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of each array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def own_rows(count: int, mesh: Mesh) -> np.ndarray:
    """The increasing indices of the rows, of `count`, on devices of this process. Other processes may hold them too."""
    held = NamedSharding(mesh, PartitionSpec(row_axes(mesh))).addressable_devices_indices_map((count,))
    return np.unique(np.concatenate([np.arange(count)[index] for index in held.values() if index is not None]))


def shard_rows(batch: np.ndarray, mesh: Mesh, axis: int = 0, *, count: int | None = None) -> jax.Array:
    """A global array with its rows, which lie along `axis`, divided over the mesh axes that divide rows.

    `batch` holds all rows. If `count`, the total number of rows, is given, it holds only this process's `own_rows`.
    """
    rows = PartitionSpec(*[None] * axis, row_axes(mesh))
    if count is None:
        return jax.make_array_from_callback(batch.shape, NamedSharding(mesh, rows), lambda index: batch[index])
    own, shape = own_rows(count, mesh), (*batch.shape[:axis], count, *batch.shape[axis + 1 :])

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[axis].indices(count)
        first = int(np.searchsorted(own, start))
        return batch[(*index[:axis], slice(first, first + stop - start), *index[axis + 1 :])]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, rows), part)


def abstract_rows(shape: tuple[int, ...], mesh: Mesh, axis: int = 0, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding that `shard_rows` gives an array of this shape. No array is created."""
    rows = PartitionSpec(*[None] * axis, row_axes(mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, rows))


def fetch(array: jax.Array) -> np.ndarray:
    """Copy a whole array to the host, in every process. All processes must call it together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
