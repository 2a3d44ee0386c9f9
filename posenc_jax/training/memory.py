"""Device memory, and checks that a model fits into it. They use only the settings and create no array."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from posenc_jax.config import RunConfig, TransformerConfig
from posenc_jax.schema import ConfigError

VALUE_BYTES = 4  # of a parameter in float32
# The least bytes of a parameter and its moments, by optimizer. Muon has two moments of some parameters, and Adafactor
# almost none of large matrices.
STATE_BYTES = {"adamw": 12, "lion": 8, "muon": 8, "adafactor": 4}


def check_fits(config: RunConfig, mesh: Mesh | None, parameters: int | None = None, *, trains: bool = True) -> None:
    """Raise ConfigError if parameters and optimizer moments alone exceed the memory of the devices that share them.

    There are no moments unless the run `trains`. Devices along the mesh axes "fsdp" and "tensor" share them. Without a
    mesh, they are on the first device. If `parameters` is None, the check uses `least_parameters`, because an exact
    count needs a trace, which may never end for a model that is far too large. The error names the largest dimension,
    or the encoding.
    """
    parts = 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]
    least = least_parameters(config)
    bytes_each = STATE_BYTES[config.optimizer.name] if trains else VALUE_BYTES
    needed = bytes_each * (least if parameters is None else parameters)
    present = device_memory(jax.local_devices()) * parts
    if needed > present:
        names = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")
        dimensions = {f"config.model.{name}": getattr(config.model, name, 0) for name in names}
        symbols = "the vocabulary of config.task" if config.task.name else "config.data.vocab_size"
        dimensions[symbols] = config.vocab_size
        large = parameters is not None and parameters > 2 * least
        field = "config.encoding.name" if large else max(dimensions, key=dimensions.__getitem__)
        counted = "parameters and moments" if trains else "parameters"
        allowed = f"must be smaller: {counted} take at least {needed / 2**30:,.1f} GiB, "
        allowed += f"and {parts} {'device has' if parts == 1 else 'devices have'} {present / 2**30:,.1f} GiB"
        value = dimensions.get(field, config.encoding.name)
        raise ConfigError(field, value, allowed)


def check_dispatch_fits(config: RunConfig, batches: jax.ShapeDtypeStruct) -> None:
    """Raise ConfigError if a device's shard of the tokens of a dispatch, [K, B, N], exceeds the device's memory."""
    assert batches.sharding is not None
    needed = math.prod(batches.sharding.shard_shape(batches.shape)) * batches.dtype.itemsize
    present = device_memory(jax.local_devices())
    if needed > present:
        allowed = f"must be smaller: {batches.shape[0]} batches put {needed / 2**30:,.1f} GiB of tokens on a device, "
        allowed += f"which has {present / 2**30:,.1f} GiB"
        raise ConfigError("config.training.batch_size", config.training.batch_size, allowed)


def least_parameters(config: RunConfig) -> int:
    """A lower bound of the number of parameters: those in matrices; for a recurrent model, those in some matrices."""
    model = config.model
    embeddings = config.vocab_size * model.d_model * (1 if model.tied_embeddings else 2)
    if not isinstance(model, TransformerConfig):
        return embeddings + model.num_layers * model.d_model**2
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    feed_forward = (3 if model.gated else 2) * model.d_ff
    return embeddings + model.num_layers * model.d_model * (attention + feed_forward)


def device_memory(devices: Sequence[Any]) -> int:
    """The bytes of memory of each device. CPU devices have equal shares of the machine's memory."""
    stats = devices[0].memory_stats()
    if stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
