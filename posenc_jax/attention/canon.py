r"""Canon layers: each token gets a learned sum of itself and the tokens just before it.

.. math:: x'_t = x_t + \sum_{s=0}^{3} w_s \odot x_{t-s}

with one weight per channel and distance, and zeros before the first token. Placed before attention (Canon-A), they tell
a model the order of nearby tokens. They are thus a control for encodings of positions. Source: Allen-Zhu 2025 ("Physics
of Language Models: Part 4.1"), with the initial values of PyTorch's Conv1d.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from posenc_jax.documents import shifted

TOKENS = 4  # of the sum


class Canon(nnx.Module):
    """The layer for tokens of width D. Learned: weights [4, D]."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        bound = TOKENS**-0.5
        self.weights = nnx.Param(jax.random.uniform(rngs.params(), (TOKENS, width), jnp.float32, -bound, bound))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        before: Float[Array, "B 3 D"] | None = None,
        documents: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B 3 D"]]:
        """The sums, and the last three inputs, which are `before` for the tokens that follow.

        With `documents`, there are zeros before the first token of each.
        """
        (B, T, D), earlier = x.shape, TOKENS - 1
        joined = jnp.concatenate([jnp.zeros((B, earlier, D), x.dtype) if before is None else before, x], axis=1)
        weights = self.weights[...].astype(x.dtype)

        def tokens_before(s):
            return joined[:, earlier - s : earlier - s + T] if documents is None else shifted(x, documents, s)

        sums = sum(weights[s] * tokens_before(s) for s in range(TOKENS))
        return x + sums, joined[:, -earlier:]
