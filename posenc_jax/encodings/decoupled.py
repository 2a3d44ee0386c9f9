"""Decoupled RoPE: positions rotate channels of their own, and content has the others."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from posenc_jax.encodings.base import Dims
from posenc_jax.encodings.rotary import RoPE
from posenc_jax.schema import Fraction


class DecoupledRoPE(RoPE):
    r"""Decoupled RoPE of multi-head latent attention (MLA): rotated channels beside those of queries and keys.

    .. math:: z_{ij} = \big(q_i \cdot k_j + R_i\, q^R_i \cdot R_j\, k^R_j\big) / \sqrt{d + r}, \quad
        q^R = W_Q\, x, \quad k^R = W_K\, x

    with RoPE's rotation R of r = fraction * d channels. Each head has its own q^R, and all heads share k^R. q and k are
    not rotated. `base`, `pairing`, `scaling` and `window_base` are those of `RoPE`. Queries and keys become d + r wide.
    Learned, one set per layer: W_Q [D, H r] and W_K [D, r], initially LeCun normal. Source: DeepSeek-V2 (2024), §2.1.3,
    where r = d/2. Differs from the reference: this is only the positional part of MLA. Queries, keys and values are not
    compressed to latents, and q^R is a projection of x, not of the latent of queries. The attention factor of YaRN
    multiplies only the rotated channels. In DeepSeek's code it multiplies the whole logit.
    """

    shared = False

    @dataclass(frozen=True)
    class Config(RoPE.Config):
        fraction: Fraction = 0.5  # r, as a fraction of the head's d channels

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        super().__init__(config, dims, rngs)
        width = 2 * self.inverse_frequencies.shape[0]
        self.queries = nnx.Linear(dims.d_model, dims.num_heads * width, use_bias=False, rngs=rngs)  # W_Q
        self.key = nnx.Linear(dims.d_model, width, use_bias=False, rngs=rngs)  # W_K

    def extend(self, x, positions, state, documents=None):
        tokens, width = x.reshape(-1, x.shape[-1]).astype(jnp.float32), 2 * self.inverse_frequencies.shape[0]
        q, k = (linear(tokens).reshape(*x.shape[:2], -1, width) for linear in (self.queries, self.key))
        return (q, k), None

    def rotate(self, q, k, q_pos, k_pos, ctx):
        q_part, k_part = super().rotate(ctx[0], ctx[1], q_pos, k_pos, ctx)
        k_part = jnp.broadcast_to(k_part, (*k.shape[:-1], k_part.shape[-1]))
        return tuple(jnp.concatenate([x, part.astype(x.dtype)], axis=-1) for x, part in ((q, q_part), (k, k_part)))
