"""The kind of device that a program is compiled for. It need not be one of this machine."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Target:
    platform: str  # cpu | gpu | tpu
    compute_capability: str = ""  # "8.0" for an NVIDIA GPU, a name for AMD's; "" if it is not known


def target() -> Target:
    """The devices of the mesh of `jax.set_mesh` or `jax.shard_map`. Without a mesh, the first device that JAX sees."""
    first, wanted = jax.devices()[0], jax.sharding.get_abstract_mesh().abstract_device
    if wanted is None or wanted.device_kind == first.device_kind:
        return Target(first.platform, getattr(first, "compute_capability", ""))
    if wanted.device_kind.startswith("TPU"):
        return Target("tpu")
    return Target("cpu" if wanted.device_kind == "cpu" else "gpu")
