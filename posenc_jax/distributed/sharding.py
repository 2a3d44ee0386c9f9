"""Where arrays live: which devices hold which part of a batch, and of each parameter."""

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

# Which axes of the mesh divide which dimensions of an array: the first pattern found in its path decides. The optimizer
# keeps its moments by the same paths. Heads and hidden width are split over "tensor", as in Megatron-LM (Shoeybi et al.
# 2019), and the other dimension over "fsdp", as in ZeRO-3 (Rajbhandari et al. 2020).
RULES = (
    (r"block_\d+/(attention/[qkv]|feed_forward/(gate|up))/kernel$", ("fsdp", "tensor")),
    (r"block_\d+/(attention/out|feed_forward/down)/kernel$", ("tensor", "fsdp")),
    (r"(^|/)embedding$", ("tensor", "fsdp")),
    (r"(^|/)(unembedding|head/hidden)/kernel$", ("fsdp", "tensor")),
    (r"encoding_\d+/(.*/)?(kernel|table)$", ("fsdp",)),
    (r"encoding_\d+/projection$", ("tensor", None, "fsdp")),  # heads x channels x width
    (r"", ()),
)


def divide_cpu(parts: int, rows: int) -> None:
    """Make JAX see the CPU as up to `parts` devices: at most one per core, and as many as can share `rows` evenly.

    Each then runs its part of a step beside the others, also the operations for which XLA uses one core. A number set
    by the environment (XLA_FLAGS or JAX_NUM_CPU_DEVICES) stays. Of many processes each has as many. Call it before the
    first use of a device. Raises ConfigError if jax finds no devices.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        most = min(parts, os.cpu_count() or 1)
        number = max((n for n in range(1, most + 1) if rows % (n * hosts.count()) == 0), default=1)
        if jax.config.jax_num_cpu_devices < 1:  # type: ignore[attr-defined]  # the first run of a process sets it
            jax.config.update("jax_num_cpu_devices", number)
    environment.check_devices()


def make_mesh(rows: int, devices: Sequence[Any] | None = None, *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """All devices, or those given, along the axes "data", "fsdp" and "tensor"; "data" takes what the others leave.

    Raises ConfigError if `fsdp` x `tensor` devices cannot be taken evenly, or those of "data" and "fsdp" not share
    `rows` evenly.
    """
    devices = jax.devices() if devices is None else devices
    shape = _shape(rows, len(devices), fsdp, tensor)
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def _shape(rows: int, devices: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    if devices % tensor:
        raise ConfigError("config.sharding.tensor", tensor, f"must divide the {devices} devices")
    sharing = devices // tensor
    if sharing % fsdp:
        raise ConfigError(
            "config.sharding.fsdp", fsdp, f"must divide the {sharing} devices that tensor = {tensor} leaves"
        )
    if rows % sharing:
        allowed = f"must give each of {sharing} devices as many rows, but a part of the batch has {rows}"
        raise ConfigError("config.training.batch_size", rows, allowed)
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
    """Parts of the devices along "runs", each with the axes of `make_mesh`, for `count` runs of one program.

    There are `parallel_runs` parts; for 0, as many as train all runs in the fewest rounds. The devices of a part share
    rows, or without `shares_rows` there is one. Devices that cannot share them evenly are left out.

    Raises ConfigError as `make_mesh` does, or if there are fewer devices.
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


def sequence_mesh(mesh: Mesh) -> Mesh:
    """The devices of a mesh along one axis, "sequence", over which the tokens of a window are divided."""
    return Mesh(mesh.devices.flatten(), ("sequence",), axis_types=(AxisType.Auto,))


def placement(tree: Any, mesh: Mesh, *leading: str) -> Any:
    """Where RULES put each array of a tree, of which only shapes are looked at, or many of it, along `leading` axes.

    A dimension that an axis of the mesh does not divide evenly stays whole along it.
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
    """Which of so many rows are on devices of this process, in increasing order; others may have some of them too."""
    held = NamedSharding(mesh, PartitionSpec(row_axes(mesh))).addressable_devices_indices_map((count,))
    return np.unique(np.concatenate([np.arange(count)[index] for index in held.values() if index is not None]))


def shard_rows(batch: np.ndarray, mesh: Mesh, axis: int = 0, *, count: int | None = None) -> jax.Array:
    """A global array of rows, which lie along `axis`, over the axes of the mesh that divide rows.

    `batch` holds all rows or, of `count` rows in all, this process's `own_rows`.
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
    """What `shard_rows` makes of an array of this shape; no array is made."""
    rows = PartitionSpec(*[None] * axis, row_axes(mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, rows))


def fetch(array: jax.Array) -> np.ndarray:
    """An array on the host; in every process, of devices of all of them. Call it in all processes alike."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
