"""The attention layer, which takes any encoding, and the algorithms it runs by."""

from posenc_jax.attention.layer import Attention

__all__ = ["Attention"]
