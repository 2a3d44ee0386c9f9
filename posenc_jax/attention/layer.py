"""The attention layer: projections to queries, keys and values, `attention`, and the output projection."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from posenc_jax.attention.cached import LayerCache
from posenc_jax.attention.canon import Canon
from posenc_jax.attention.dispatch import attention
from posenc_jax.attention.temperature import Temperature
from posenc_jax.config import TransformerConfig
from posenc_jax.encodings.base import CAUSAL, AttentionMask, Encoding, Keys, Queries
from posenc_jax.linear import Linear


class Attention(nnx.Module):
    """Multi-head attention; with fewer key than query heads, grouped-query attention (Ainslie et al. 2023).

    The encoding is an argument, so that layers may share one. So is `attention_mask`, which says what keys a query
    sees. `temperature` scales queries after the encoding has rotated them. With `config.attention_gate`, a sigmoid of
    the input multiplies each channel of the heads' outputs (Qiu et al. 2025, "Gated attention"). `head_factor` is that
    of the encoding: the number of attention heads that it makes of each query head. `out_stddev` scales the output
    projection's initial kernel, relative to 1/sqrt(fan in).
    """

    attend: Callable[..., Array] | None = None  # the algorithm; None: `dispatch.fastest`

    def __init__(
        self,
        config: TransformerConfig,
        rngs: nnx.Rngs,
        *,
        temperature: Temperature | None = None,
        head_factor: int = 1,
        out_stddev: float = 1.0,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        dtype = jnp.dtype(config.dtype)
        inner, kv_inner = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
        attended = head_factor * inner
        out_init = nnx.initializers.variance_scaling(out_stddev**2, "fan_in", "normal")
        has_bias = config.use_bias or config.qkv_bias
        qkv = Linear(config.d_model, inner + 2 * kv_inner, use_bias=has_bias, dtype=dtype, rngs=rngs)
        self.q, self.k, self.v = qkv.split(inner, kv_inner, kv_inner)
        out = {"use_bias": config.use_bias, "dtype": dtype, "kernel_init": out_init, "rngs": rngs}
        self.out = Linear(attended, config.d_model, **out)
        self.canon = Canon(config.d_model, rngs) if config.canon else None
        self.gate = Linear(config.d_model, attended, dtype=dtype, rngs=rngs) if config.attention_gate else None
        self.temperature = temperature
        heads = head_factor * config.num_heads
        self.sinks = nnx.Param(jnp.zeros(heads, jnp.float32)) if config.attention_sinks else None
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
            self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        encoding: Encoding,
        x: Float[Array, "B T D"],
        positions: Real[Array, "#B P"],
        attention_mask: AttentionMask = CAUSAL,
        cache: LayerCache | None = None,
        documents: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The output of T tokens. With a `cache`, they follow its tokens, and `positions` are those of all slots.

        Without one, they may be of several `documents`: see `posenc_jax.documents`.
        """
        B, T, D = x.shape
        if self.canon is not None:
            x, nearby = self.canon(x, None if cache is None else cache.nearby, documents)
            if cache is not None:
                cache.nearby = nearby
        q, k, v = self.project(x)
        sinks = None if self.sinks is None else self.sinks[...]
        own = {"x": x, "temperature": self.temperature, "sinks": sinks, "attend": self.attend}
        attend = functools.partial(attention, documents=documents) if cache is None else cache.attention
        out = attend(encoding, q, k, v, positions, attention_mask, **own)
        out = out.reshape(B * T, -1)
        if self.gate is not None:
            out = out * jax.nn.sigmoid(self.gate(x.reshape(B * T, D)))
        return self.out(out).reshape(B, T, D)

    def project(self, x: Float[Array, "B T D"]) -> tuple[Queries, Keys, Keys]:
        """Queries, keys and values, before the encoding rotates them."""
        B, T, D = x.shape
        q, k, v = (linear(x.reshape(B * T, D)).reshape(B, T, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v
