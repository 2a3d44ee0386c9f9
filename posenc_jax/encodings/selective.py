"""Rotations by angles that the tokens set: Selective RoPE and CARoPE."""

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from posenc_jax.encodings.base import Base, Dims, Encoding, Keys, Queries, constant
from posenc_jax.encodings.bias import inverse_softplus
from posenc_jax.encodings.gated import causal_convolution, running_sum
from posenc_jax.encodings.rotary import apply_rotary, head_frequencies
from posenc_jax.schema import ConfigError, Count, Range


class SelectiveRoPE(Encoding):
    r"""Selective RoPE: the angle between key and query is a sum of angles computed from the tokens between them.

    .. math:: z_{ij} = q_i \cdot R(\Phi_j - \Phi_i)\, k_j / \sqrt{d}, \quad \Phi_t = \sum_{l \le t} \phi_l, \quad
        \phi = e^b + \mathrm{conv}(W_2 W_1\, x / |x|), \quad R(\Phi) = \mathrm{diag}_m\, \mathrm{rot}(\theta_m \Phi_m)

    with theta_m = base^(-2m/d) radians, pairs (m, m + d/2), and a depthwise causal convolution over `taps` tokens. phi
    = 1 is RoPE with positions counted in tokens; the positions that the model is given are not read. The sums are
    float32. Data dependent. Learned, one set per layer: b [K d/2], initially 0, so that a new model without the gate is
    near RoPE; W_1 [D, rank], W_2 [rank, K d/2] and the convolution [taps, K d/2], initially as PyTorch's layers.
    Without `bias` there is no e^b. `activation` is applied to the convolution. If `gate`, the phi of each head is
    multiplied by `sigmoid(w . x/|x| + c)`, where w [D, K] is initially LeCun normal and c is 0.

    Source: Movahedi et al. 2025 and the released code, with the rank of its configurations. Differs from the reference:
    only its runs on small tasks have the bias. Its runs on language also decay (gated linear attention), and have SiLU,
    the gate, and a weight-normalized matrix per head for W_2 W_1. Its weights start normal with deviation 0.02. Here
    each head of keys has one Phi, which its group of queries shares; the reference does not support grouped queries. (A
    query and a key need the same Phi for the logit to depend on its difference.) `|x|` is the norm of the token; the
    reference, and `faithful`, normalize each of H parts of x separately.
    """

    shared = False
    rotates_keys_once = True
    causal_only = True

    @dataclass(frozen=True)
    class Config:
        base: Base = 500000.0
        rank: Count = 32
        taps: Annotated[int, Range(at_least=1, at_most=256)] = 4
        bias: bool = True
        activation: Literal["none", "silu"] = "none"
        gate: bool = False
        faithful: bool = False

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.parts = dims.num_heads if config.faithful else 1
        if dims.d_model % self.parts:
            allowed = f"must be False where num_heads = {dims.num_heads} does not divide d_model = {dims.d_model}"
            raise ConfigError("encoding.faithful", config.faithful, allowed)
        channels = dims.num_kv_heads * dims.head_dim // 2
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.down = nnx.Linear(dims.d_model, config.rank, use_bias=False, kernel_init=uniform, rngs=rngs)
        self.up = nnx.Linear(config.rank, channels, use_bias=False, kernel_init=uniform, rngs=rngs)
        self.taps = nnx.Param(uniform(rngs.params(), (config.taps, channels), jnp.float32))
        self.log_bias = nnx.Param(jnp.zeros(channels, jnp.float32)) if config.bias else None
        self.activation = config.activation
        self.gate = nnx.Linear(dims.d_model, dims.num_kv_heads, rngs=rngs) if config.gate else None
        self.temperatures = constant(head_frequencies(dims, config.base))  # [d/2] radians

    def extend(self, x, positions, state, documents=None):
        earlier, total = (None, None) if state is None else state
        batch, length, width = x.shape
        parts = x.astype(jnp.float32).reshape(-1, self.parts, width // self.parts)
        unit = parts * jax.lax.rsqrt((parts**2).sum(axis=-1, keepdims=True) + 1e-6)
        unit = unit.reshape(-1, width)
        turns = self.up(self.down(unit)).reshape(batch, length, -1)
        turns, earlier = causal_convolution(turns, self.taps[...], earlier, documents)
        if self.activation == "silu":
            turns = jax.nn.silu(turns)
        if self.log_bias is not None:
            turns = turns + jnp.exp(self.log_bias[...])
        turns = turns.reshape(batch, length, -1, len(self.temperatures[...]))  # [B, T, K, d/2]
        if self.gate is not None:
            turns = turns * jax.nn.sigmoid(self.gate(unit)).reshape(batch, length, -1, 1)
        total = running_sum(turns, total, documents)
        angles = total * self.temperatures[...]
        return (angles, angles), (earlier, total[:, -1:])

    def rotate(self, q, k, q_pos, k_pos, ctx):
        return rotated_by(q, k, *ctx)


class CARoPE(Encoding):
    r"""Context-aware RoPE: the tokens set the base frequency of each head, and angles are sums over the tokens.

    .. math:: z_{ij} = q_i \cdot R(\Phi_j - \Phi_i)\, k_j / \sqrt{d}, \quad \Phi_{tm} = \sum_{l \le t} f(x_l)^m, \quad
        f(x) = \frac{1}{1 + \mathrm{softplus}(w \cdot x + b)}, \quad R(\Phi) = \mathrm{diag}_m\, \mathrm{rot}(\Phi_m)

    with pairs (m, m + d/2), m = 0 .. d/2 - 1. f is in (0, 1), so that the first pair always turns by one radian per
    token, and the others by less. A constant f = base^(-2/d) is RoPE with positions counted in tokens; the positions
    that the model is given are not read. The sums are float32. Data dependent. Learned, one set per layer: w [D, K],
    initially 0, and b [K], initially such that the model starts as RoPE. Source: Veisi et al. 2025, §2. Differs from
    the paper: x is the input of the layer, where the paper has the embedding of the token. b is ours; the paper starts
    from RoPE too, but does not say how. Each head of keys has one f, which its group of queries shares.
    """

    shared = False
    rotates_keys_once = True
    causal_only = True

    @dataclass(frozen=True)
    class Config:
        base: Base = 10000.0  # of the RoPE that a new model has

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.pairs = len(head_frequencies(dims, config.base))
        (start,) = inverse_softplus(np.array([config.base ** (2 / dims.head_dim) - 1]))  # so that f = base^(-2/d)
        init = {"kernel_init": nnx.initializers.zeros, "bias_init": nnx.initializers.constant(start)}
        self.frequency = nnx.Linear(dims.d_model, dims.num_kv_heads, rngs=rngs, **init)

    def extend(self, x, positions, state, documents=None):
        tokens = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        log_f = -jnp.log1p(jax.nn.softplus(self.frequency(tokens))).reshape(*x.shape[:2], -1, 1)  # [B, T, K, 1]
        angles = running_sum(jnp.exp(log_f * jnp.arange(self.pairs)), state, documents)
        return (angles, angles), angles[:, -1:]

    def rotate(self, q, k, q_pos, k_pos, ctx):
        return rotated_by(q, k, *ctx)


def rotated_by(
    q: Queries, k: Keys, q_angles: Float[Array, "B T K half"], k_angles: Float[Array, "B S K half"]
) -> tuple[Queries, Keys]:
    """Queries and keys, whose pairs (m, m + d/2) are rotated by these angles (radians) of each head of keys."""
    q_angles = jnp.repeat(q_angles, q.shape[2] // k.shape[2], axis=2)
    q, k = (apply_rotary(x, jnp.cos(angles), jnp.sin(angles)) for x, angles in ((q, q_angles), (k, k_angles)))
    return q, k
