"""The choice of a kernel for the devices that a program is compiled for."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from posenc_jax.attention import fused
from posenc_jax.attention.pallas import kernel, tpu_kernel
from posenc_jax.attention.rows import on_rows
from posenc_jax.attention.target import Target, target
from posenc_jax.encodings.base import AttentionMask, Encoding


def accelerated(
    encoding: Encoding,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K e"],
    attention_mask: AttentionMask,
    device: Target | None = None,
) -> Callable[..., Array] | None:
    """The fastest kernel of the device (by default `target`) for this attention; None if there is none.

    GPUs from NVIDIA's Ampere on have `fused`, by cuDNN, and `kernel`. TPUs have `fused`, by splash attention, and
    `tpu_kernel`. Each of several devices runs the kernel on its rows. Devices that share heads have only cuDNN's, and
    devices that share a window have none.
    """
    device, mesh = device or target(), jax.sharding.get_abstract_mesh()
    on_gpu = device.platform == "gpu"
    if "sequence" in mesh.axis_names or (on_gpu and not _at_least_ampere(device)):
        return None
    if fused.runs(encoding, q, k, v, attention_mask, device.platform):
        attend = fused.fused
        if on_gpu:
            return attend  # the compiler can divide cuDNN's kernels
    elif on_gpu and kernel.runs(encoding, q, v, attention_mask):
        attend = kernel.kernel
    elif device.platform == "tpu" and tpu_kernel.runs(encoding, q, v, attention_mask):
        attend = tpu_kernel.tpu_kernel
    else:
        return None
    # The compiler cannot divide Pallas kernels.
    if mesh.empty:
        return attend if jax.device_count() == 1 else None
    return on_rows(attend, len(q))


def _at_least_ampere(device: Target) -> bool:
    capability = device.compute_capability
    return capability[:1].isdigit() and float(capability) >= 8
