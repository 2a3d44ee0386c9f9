"""RoPE++ against its equation, and the layers that it gives more attention heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.config import TemperatureConfig
from posenc_jax.encodings.base import Dims
from posenc_jax.models.transformer import Transformer
from posenc_jax.schema import ConfigError
from tests.small import run_config

B, T, H, D = 2, 6, 4, 8


@pytest.mark.parametrize(("kv_heads", "settings"), [(4, {}), (2, {"base": 50.0, "pairing": "interleaved"})])
def test_heads_have_the_real_and_the_imaginary_part_of_the_product(kv_heads, settings):
    encoding = encodings.build("rope_pp", Dims(12, H, kv_heads, D, 16), nnx.Rngs(0), **settings)
    q, k = (jax.random.normal(jax.random.key(n), (B, T, n, D)) for n in (H, kv_heads))
    positions = jnp.asarray([[0, 1, 3, 4, 9, 30]])
    turned, keys = encoding.rotate(q, k, positions, positions, (None, None))
    found = encoding.scores(turned, jnp.repeat(keys, 2 * H // kv_heads, axis=2), (None, None))
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    q, k = (x[..., ::2] + 1j * x[..., 1::2] if "pairing" in settings else x[..., :4] + 1j * x[..., 4:] for x in (q, k))
    theta = settings.get("base", 1e4) ** (-2 * np.arange(D // 2) / D)
    for h, i, j in np.ndindex(H, T, T):
        distance = int(positions[0, i] - positions[0, j])
        product = (q[:, i, h] * k[:, j, h * kv_heads // H].conj() * np.exp(1j * distance * theta)).sum(-1) / np.sqrt(D)
        np.testing.assert_allclose(found[:, 2 * h, i, j], product.real, atol=2e-5)
        np.testing.assert_allclose(found[:, 2 * h + 1, i, j], product.imag, atol=2e-5)


def test_layers_with_it_have_twice_the_attention_heads_and_others_do_not():
    config = run_config("rope_pp", model__attention_sinks=True, model__attention_gate=True, model__pattern="EN")
    temperature = TemperatureConfig("ssmax", scale=0.5, floor=4, layers="EN")
    options = {"vocab_size": 8, "max_length": 8}
    model = nnx.eval_shape(lambda: Transformer(config.model, config.encoding, temperature, **options, rngs=nnx.Rngs(0)))
    heads, width = config.model.num_heads, config.model.d_model
    for layer, factor in ((0, 2), (1, 1)):
        attention = model.block(layer).attention
        inner = factor * heads * config.model.head_dim
        assert attention.q.kernel.shape == (width, heads * config.model.head_dim)
        assert attention.out.kernel.shape == (inner, width)
        assert attention.gate.kernel.shape == (width, inner)
        assert attention.sinks.shape == attention.temperature.s.shape == (factor * heads,)


def test_layers_cannot_drop_it():
    with pytest.raises(
        ConfigError, match=r"config.training.drope = '1 steps': must be '0 steps' for encoding 'rope_pp'"
    ):
        run_config("rope_pp", training__drope="1 steps")
