"""Encodings whose gates, computed from the content, decide how fast the past fades."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from posenc_jax.encodings.base import Dims, Encoding


class FoX(Encoding):
    r"""Forgetting attention: each token's gate scales down all attention across it.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + \sum_{l=j+1}^{i} \ln f_l, \quad f_t = \sigma(w_h \cdot x_t + b_h)

    A constant gate f is ALiBi with slope -ln f. The sum is a difference of float32 cumulative sums. Learned, one set
    per layer: w [D, H], initially LeCun normal, and b [H], initially `bias_init`. Data dependent. Source: Lin et al.
    2025, §3, without its "Pro" block, which is another architecture rather than another encoding.
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        bias_init: float = 0.0  # b; the gate of a new model is sigmoid(b)

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        bias_init = nnx.initializers.constant(config.bias_init)
        self.gate = nnx.Linear(dims.d_model, dims.num_heads, bias_init=bias_init, rngs=rngs)

    def prepare(self, x, positions):
        batch, length, width = x.shape
        gates = jax.nn.log_sigmoid(self.gate(x.reshape(-1, width).astype(jnp.float32)))
        total = jnp.cumsum(gates.reshape(batch, length, -1), axis=1)  # [B, T, H]
        return total, total

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        q_total, k_total = (jnp.moveaxis(total, -1, 1) for total in ctx)  # [B, H, T], [B, H, S]
        return q_total[..., :, None] - k_total[..., None, :]
