"""RoPE++: attention heads with the imaginary part of RoPE's product, beside those with the real part."""

import jax.numpy as jnp

from posenc_jax.encodings.rotary import RoPE, apply_rotary


class RoPEPlusPlus(RoPE):
    r"""RoPE++: each query head attends twice, by the real and by the imaginary part of RoPE's complex product.

    .. math:: z_{ij} = \mathrm{Re}\, c_{ij} / \sqrt{d} \quad\text{and}\quad z'_{ij} = \mathrm{Im}\, c_{ij} / \sqrt{d},
        \quad c_{ij} = \sum_m Q_{im}\, \overline{K_{jm}}\, e^{i (i - j)\, \theta_m}

    where Q and K are the pairs of channels as complex numbers, and theta_m are RoPE's rates (radians per token). The
    imaginary part is the real part of queries that are turned back by a quarter of a circle. A model with H query heads
    thus has 2H attention heads, with twice the logits and twice the inputs of the output projection, but the same
    cache. Settings are those of `RoPE`. Nothing is learned. Source: Liu et al. 2025 (RoPE++), §3, as in the authors'
    code: the form EC, with equal cache. Half as many heads of queries, keys and values give EH, with equal attention
    heads.
    """

    head_factor = 2

    def rotate(self, q, k, q_pos, k_pos, ctx):
        cos, sin = self.cos_sin(q_pos)
        both = [apply_rotary(q, *turn, self.pairing) for turn in ((cos, sin), (sin, -cos))]
        batch, length, heads, width = q.shape
        return jnp.stack(both, axis=3).reshape(batch, length, 2 * heads, width), self.rotated(k, k_pos)
