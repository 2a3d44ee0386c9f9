"""Temperatures of attention that grow with the logarithm of the context, for any encoding."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from posenc_jax.encodings.base import Queries, QueryPositions, constant
from posenc_jax.layer_config import LayerTemperature


class Temperature(nnx.Module):
    r"""Scale each query, and so its products with keys, by the length of the context that it sees.

    .. math:: q_i \leftarrow s_h \ln(n_i)\, q_i \quad (\mathrm{ssmax}), \qquad
        q_i \leftarrow \left(1 + a \ln(1 + \lfloor (i + 1) / f \rfloor)\right) q_i \quad (\mathrm{llama4}), \qquad
        q_i \leftarrow \max(1, \ln n_i / \ln L)\, q_i \quad (\mathrm{logn})

    with n_i the number of keys that query i sees and L = `max_length`. Learned, only for ssmax: s [H] per layer,
    initially 1 / ln(L), so that training begins near plain attention. logn changes only queries that see more keys than
    in training: nothing in training itself, and in longer texts nothing in layers with a window. Source: Nakanishi 2025
    (Scalable-Softmax); Llama 4's released code, where `scale` a is 0.1 and `floor` f is 8192 tokens; logn: Qwen's
    released code (`use_logn_attn`).

    Queries are scaled after `rotate`, so the encoding's `scores` and `bias` read scaled queries. Biases that do not
    depend on the query are not scaled: those of positions, of keys (GRAPE-A) and of gates (FoX, GRAPE-AP). Shaw's bias,
    a product with the query, is scaled, and so is that part of DeBERTa's. CoPE, DAPE and DAPE V2 compute their bias
    from the scaled logits.
    """

    def __init__(self, config: LayerTemperature, num_heads: int, max_length: int):
        self.form = config.form
        if config.form == "ssmax":
            self.s = nnx.Param(jnp.full((num_heads,), 1 / math.log(max_length), jnp.float32))
        elif self.form == "logn":
            self.per_logarithm = constant(1 / math.log(max_length))
        else:
            self.scale, self.floor = constant(config.scale), constant(config.floor)

    def __call__(
        self,
        q: Queries,
        positions: QueryPositions,
        window: int | None,
        earlier: int | Int[Array, ""] = 0,
        places: Int[Array, "B T"] | None = None,
    ) -> Queries:
        """The scaled queries. `earlier` keys come before the key of the first query.

        If a window holds several documents, `places` are the indices of the queries in them.
        """
        if self.form == "llama4":
            steps = jnp.floor((positions.astype(jnp.float32) + 1) / self.floor[...])
            factor = 1 + self.scale[...] * jnp.log1p(steps)[..., None]
        else:
            seen = (earlier + 1 + jnp.arange(q.shape[1]))[None] if places is None else places + 1
            seen = jnp.minimum(seen, window) if window else seen
            logarithm = jnp.log(seen.astype(jnp.float32))[..., None]
            learned = self.form == "ssmax"
            factor = self.s[...] * logarithm if learned else jnp.maximum(1, self.per_logarithm[...] * logarithm)
        return (q * factor[..., None]).astype(q.dtype)
