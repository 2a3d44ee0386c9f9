"""Where arrays live: parameters on every device, batches split over them by rows."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from posenc_jax.schema import ConfigError


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
