"""Attention of a batch whose rows several devices share."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array

from posenc_jax.parallel import map_rows


def on_rows(attend: Callable[..., Array]) -> Callable[..., Array]:
    """The algorithm, which each device runs on its rows; as it is, where devices share heads or a window too.

    Left to the compiler, devices would add up the gradient of a learned bias after every block, not once.
    """
    axes = dividing_axes()
    if not axes or not axes <= {"data", "fsdp"}:
        return attend

    def attend_rows(encoding, q, k, v, q_pos, k_pos, ctx, sight):
        graphdef, arrays = nnx.split(encoding)

        def own(rows, arrays):
            return attend(nnx.merge(graphdef, arrays), *rows, sight)

        return map_rows(own, (q, k, v, q_pos, k_pos, ctx), arrays)

    return attend_rows


def dividing_axes() -> set[str]:
    """Axes of the mesh along which the compiler divides arrays among devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes}
