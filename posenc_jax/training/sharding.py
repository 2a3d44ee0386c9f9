"""Where arrays live: parameters on every device, batches split over them by rows."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from posenc_jax.schema import ConfigError


def divide_cpu(parts: int, rows: int) -> None:
    """Make JAX see the CPU as up to `parts` devices: at most one per core, and as many as can share `rows` evenly.

    Each then runs its part of a step beside the others, also the operations for which XLA uses one core. A number set
    by the environment (XLA_FLAGS or JAX_NUM_CPU_DEVICES) stays. Call it before the first use of a device.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    most = min(parts, os.cpu_count() or 1)
    jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if rows % n == 0))


def make_mesh(rows: int, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices, or those given, along one axis "data". Raises ConfigError if they cannot share `rows` evenly."""
    devices = jax.devices() if devices is None else devices
    if rows % len(devices):
        allowed = f"must give each of the {len(devices)} devices as many rows, but a part of the batch has {rows}"
        raise ConfigError("config.training.batch_size", rows, allowed)
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of each array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_rows(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """A global array from this process's rows `[rows, ...]` of it."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), batch)
