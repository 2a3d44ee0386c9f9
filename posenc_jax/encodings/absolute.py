"""Encodings that are added to the token embeddings: sinusoidal and learned."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posenc_jax.encodings.base import Dims, Encoding, constant
from posenc_jax.schema import Positive


class Sinusoidal(Encoding):
    r"""Sines and cosines of the position, at wavelengths from 2 pi to 2 pi base tokens, added to the embeddings.

    .. math:: x_t \leftarrow x_t + a\, p_t, \quad p_{t,2m} = \sin(t\,\theta_m), \; p_{t,2m+1} = \cos(t\,\theta_m),
        \quad \theta_m = base^{-2m/D}

    Source: Vaswani et al. 2017, §3.5. Nothing is learned. Differs from the reference: there the embeddings have
    standard deviation D^(-1/2) and are multiplied by sqrt(D) before the sum. Here token embeddings already have
    standard deviation 1, so the ratio of the two is the paper's.
    """

    relative = False

    @dataclass(frozen=True)
    class Config:
        base: Positive = 10000.0
        amplitude: Positive = 1.0  # a

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = config.base ** (-np.arange(0, dims.d_model, 2, dtype=np.float64) / dims.d_model)
        self.inverse_frequencies = constant(theta)  # [ceil(D/2)] radians per token
        self.amplitude = constant(config.amplitude)

    def embed(self, x, positions):
        angles = positions[..., None].astype(jnp.float32) * self.inverse_frequencies[...]
        waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        waves = waves.reshape(*angles.shape[:-1], -1)[..., : x.shape[-1]]
        return x + (self.amplitude[...] * waves).astype(x.dtype)


class Learned(Encoding):
    r"""One learned vector per position, added to the embeddings. There are none beyond the training length.

    .. math:: x_t \leftarrow x_t + E_t

    Source: Gehring et al. 2017, §3.1; Devlin et al. 2019. Learned: E [length, D], initially normal with standard
    deviation `stddev`. Its default is that of the token embeddings, as in BERT. A sequence longer than the table raises
    ValueError. Positions beyond the table give NaN, where indexing in JAX would return the last row. Between whole
    positions, rows are interpolated.
    """

    relative = False

    @dataclass(frozen=True)
    class Config:
        stddev: Positive = 1.0

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.table_length, shape = dims.max_length, (dims.max_length, dims.d_model)
        self.table = nnx.Param(config.stddev * jax.random.normal(rngs.params(), shape, jnp.float32))

    def embed(self, x, positions):
        fractional = jnp.issubdtype(positions.dtype, jnp.floating)
        if positions.shape[-1] > len(self.table[...]) and not fractional:
            raise ValueError(f"{positions.shape[-1]} positions are beyond the {len(self.table[...])} that were learned")
        rows = self._rows(positions)
        if fractional:
            share = (positions % 1)[..., None]
            rows = rows + jnp.where(share > 0, share * (self._rows(positions + 1) - rows), 0)
        return x + rows.astype(x.dtype)

    def _rows(self, positions):
        return self.table[...].at[positions.astype(jnp.int32)].get(mode="fill", fill_value=jnp.nan)
