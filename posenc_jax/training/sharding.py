"""Where arrays live: parameters on every device, batches split over them by rows."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from posenc_jax.schema import ConfigError


def make_mesh(batch_size: int) -> Mesh:
    """All devices along one axis "data". Raises ConfigError if they cannot share a batch of `batch_size` rows."""
    count = jax.device_count()
    if batch_size % count:
        allowed = f"divided by accumulation, must be a multiple of the {count} devices"
        raise ConfigError("config.training.batch_size", batch_size, allowed)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a copy of each array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_rows(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """A global array from this process's rows `[rows, ...]` of it."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), batch)
