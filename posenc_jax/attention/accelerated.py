"""Which kernel made for the devices of a program, if any, an attention runs by."""

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
    """The fastest algorithm of the device (by default the `target`) that can compute this attention, if it has its own.

    On a GPU, from NVIDIA's Ampere on: `fused` by cuDNN, or `kernel`. On a TPU: `fused` by splash attention, or
    `tpu_kernel`. Of several devices, each runs it on its rows. Devices that share heads have cuDNN's alone; those that
    share a window, none.
    """
    device, mesh = device or target(), jax.sharding.get_abstract_mesh()
    on_gpu = device.platform == "gpu"
    if "sequence" in mesh.axis_names or (on_gpu and not _at_least_ampere(device)):
        return None
    if fused.runs(encoding, q, k, v, attention_mask, device.platform):
        attend = fused.fused
        if on_gpu:
            return attend  # cuDNN's kernels say how they are divided
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
