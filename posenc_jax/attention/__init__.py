"""Attention under any encoding: a function of arrays, a layer with projections, and the algorithms that both use."""

from posenc_jax.attention.dispatch import attention
from posenc_jax.attention.layer import Attention
from posenc_jax.encodings.base import AttentionMask, Dims

__all__ = ["Attention", "AttentionMask", "Dims", "attention"]
