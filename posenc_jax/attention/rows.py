"""Attention of a batch whose rows are divided over several devices."""

import math
from collections.abc import Callable

from flax import nnx
from jaxtyping import Array

from posenc_jax.distributed.parallel import divided_axes, map_rows


def on_rows(attend: Callable[..., Array], rows: int) -> Callable[..., Array] | None:
    """The algorithm, run by each device on its part of the rows. None if devices share heads or a window too.

    The compiler by itself would sum the gradient of a learned bias over devices after every block, not once.
    """
    divided = {axis: size for axis, size in divided_axes().items() if size > 1}
    if not divided:
        return attend
    if not divided.keys() <= {"data", "fsdp"} or rows % math.prod(divided.values()):
        return None

    def attend_rows(encoding, q, k, v, q_pos, k_pos, ctx, attention_mask):
        graphdef, arrays = nnx.split(encoding)

        def own(rows, arrays):
            return attend(nnx.merge(graphdef, arrays), *rows, attention_mask)

        return map_rows(own, (q, k, v, q_pos, k_pos, ctx), arrays)

    return attend_rows
