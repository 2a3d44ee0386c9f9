"""Which kind of device a program is compiled for: those of the mesh that is set, which need not be here."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Target:
    platform: str  # cpu | gpu | tpu
    compute_capability: str = ""  # of an NVIDIA GPU "8.0", of AMD's a name; "" of other devices, and of GPUs elsewhere


def target() -> Target:
    """Devices of the mesh of `jax.set_mesh` or `jax.shard_map`; without one, the first that JAX sees."""
    first, wanted = jax.devices()[0], jax.sharding.get_abstract_mesh().abstract_device
    if wanted is None or wanted.device_kind == first.device_kind:
        return Target(first.platform, getattr(first, "compute_capability", ""))
    if wanted.device_kind.startswith("TPU"):
        return Target("tpu")
    return Target("cpu" if wanted.device_kind == "cpu" else "gpu")
