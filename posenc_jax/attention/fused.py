"""Attention by the kernels that come with JAX, for encodings whose logits are products of queries and keys.

The kernels are cuDNN's flash attention on NVIDIA's GPUs and splash attention on TPUs. An encoding or a temperature
changes queries and keys before the kernels are called.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from posenc_jax.attention.target import target
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, Encoding, overrides

CUDNN_WIDEST = 128  # channels of a head on all GPUs, Ampere included
LANES = 128  # blocks of splash attention are multiples of so many tokens


def fused(encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask) -> Float[Array, "B T H e"]:
    """Compute what `dense` computes, if this attention `runs` on the devices of the program."""
    attend = on_gpu if target().platform == "gpu" else on_tpu
    return attend(inputs, attention_mask)


def runs(encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask, backend: str) -> bool:
    """Whether a kernel of the backend, "gpu" or "tpu", computes the attention of an encoding with these arrays."""
    own = overrides(encoding, "scores", "bias", "weights", "values")
    if own or inputs.sinks is not None or inputs.documents is not None:
        return False
    q, k, v, *_ = inputs
    T, S = q.shape[1], k.shape[1]
    if backend == "gpu":
        lengths = T == S or not attention_mask.causal  # cuDNN's first query is at the first key
        narrow = q.dtype == k.dtype == v.dtype in (jnp.bfloat16, jnp.float16)
        return lengths and narrow and _cudnn_width(q, v) <= CUDNN_WIDEST
    return backend == "tpu" and (attention_mask.causal or S % LANES == 0)  # else padding would be seen


def on_gpu(
    inputs: AttentionInputs, attention_mask: AttentionMask, implementation: Any = "cudnn"
) -> Float[Array, "B T H e"]:
    """Attention by cuDNN, or by another implementation of `jax.nn.dot_product_attention`."""
    q, k, v, *_ = inputs
    width, scale = _cudnn_width(q, v), 1 / math.sqrt(q.shape[-1])
    padded = (jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in (q, k, v))
    window = (attention_mask.window - 1, 0) if attention_mask.window else None
    out = jax.nn.dot_product_attention(
        *padded, scale=scale, is_causal=attention_mask.causal, local_window_size=window, implementation=implementation
    )
    return out[..., : v.shape[-1]]


def on_tpu(inputs: AttentionInputs, attention_mask: AttentionMask, interpret: bool = False) -> Float[Array, "B T H e"]:
    """Splash attention. `interpret` runs its kernels as ordinary JAX operations, on any device."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second, which others need not pay

    q, k, v, *_ = inputs
    (T, H, d), S = q.shape[1:], k.shape[1]
    q = (q.astype(jnp.float32) / math.sqrt(d)).astype(q.dtype)
    filled = (jnp.pad(x, [(0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, 0)]) for x in (q, k, v))
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in filled)
    lengths = q.shape[2], k.shape[2]
    behind = attention_mask.window - 1 if attention_mask.window else None
    mask = splash.LocalMask(lengths, (behind, 0), offset=S - T) if attention_mask.causal else splash.FullMask(lengths)
    t, s = (math.gcd(length, 512) for length in lengths)
    sizes = splash.BlockSizes(t, s, block_q_dkv=t, block_kv_dkv=s, block_q_dq=t, block_kv_dq=s)
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * H), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    out: Any = jax.vmap(attend)(q, k, v)
    return jnp.moveaxis(out, 1, 2)[:, :T]


def _cudnn_width(q: Float[Array, "B T H d"], v: Float[Array, "B S K e"]) -> int:
    """The number of channels for cuDNN: the same for queries, keys and values, and a multiple of 8."""
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
