"""Which kernel made for the device at hand, if any, an attention runs by."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from posenc_jax.attention import fused, kernel
from posenc_jax.encodings.base import Encoding, Sight


def accelerated(
    encoding: Encoding,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K e"],
    sight: Sight,
    device: Any = None,
) -> Callable[..., Array] | None:
    """The fastest algorithm of the device (by default the first) that can compute this attention, if it has its own.

    On a GPU, from NVIDIA's Ampere on: `fused` by cuDNN, or `kernel`. On a TPU: `fused` by splash attention.
    """
    device = device or jax.devices()[0]
    if device.platform == "gpu" and not _at_least_ampere(device):
        return None
    if fused.runs(encoding, q, k, v, sight, device.platform) and (device.platform == "gpu" or not _compiler_divides()):
        return fused.fused
    if device.platform == "gpu" and kernel.runs(encoding, q, v, sight) and not _compiler_divides():
        return kernel.kernel
    return None


def _at_least_ampere(device: Any) -> bool:
    capability = device.compute_capability  # "8.0"; of AMD's, a name
    return capability[0].isdigit() and float(capability) >= 8


def _compiler_divides() -> bool:
    """Whether it is left to the compiler to divide arrays among devices, which it cannot do with Pallas kernels."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 and (mesh.empty or set(mesh.manual_axes) != set(mesh.axis_names))
