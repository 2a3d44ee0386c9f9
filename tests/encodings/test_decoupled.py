"""Decoupled RoPE against its equation, and under scaling rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import Dims
from posenc_jax.evaluation import extrapolation
from posenc_jax.training.step import build_model
from tests.small import run_config

B, T, H, D, D_MODEL = 2, 7, 4, 8, 12


@pytest.mark.parametrize(
    ("kv_heads", "settings", "scale"),
    [(4, {}, 1.0), (2, {"fraction": 1.0, "base": 50.0, "pairing": "interleaved", "scaling": "linear:factor=4"}, 4.0)],
)
def test_logits_equal_the_equation(kv_heads, settings, scale):
    encoding = encodings.build("decoupled_rope", Dims(D_MODEL, H, kv_heads, D, 16), nnx.Rngs(0), **settings)
    keys = jax.random.split(jax.random.key(0), 3)
    x, q, k = (
        jax.random.normal(key, (B, T, *shape))
        for key, shape in zip(keys, ((D_MODEL,), (H, D), (kv_heads, D)), strict=True)
    )
    positions = jnp.asarray([[0, 1, 3, 4, 9, 10, 30]])
    ctx = encoding.prepare(x, positions)
    wide_q, wide_k = encoding.rotate(q, k, positions, positions, ctx)
    found = encoding.scores(wide_q, jnp.repeat(wide_k, H // kv_heads, axis=2), ctx)
    width = int(settings.get("fraction", 0.5) * D)
    assert wide_k.shape == (B, T, kv_heads, D + width)
    x, q, k, w_q, w_k = (
        np.asarray(array, np.float64) for array in (x, q, k, encoding.queries.kernel[...], encoding.key.kernel[...])
    )

    def turned(part, position):
        half = width // 2
        pairs = part[..., :half] + 1j * part[..., half:]
        if "pairing" in settings:
            pairs = part[..., ::2] + 1j * part[..., 1::2]
        rates = settings.get("base", 1e4) ** (-2 * np.arange(half) / width) / scale
        return pairs * np.exp(1j * position * rates)

    rotated_q, rotated_k = (x @ w_q).reshape(B, T, H, width), x @ w_k
    for b, h, i, j in np.ndindex(B, H, T, T):
        of_query, of_key = (
            turned(part, int(positions[0, n])) for part, n in ((rotated_q[b, i, h], i), (rotated_k[b, j], j))
        )
        expected = q[b, i, h] @ k[b, j, h * kv_heads // H] + (of_query * of_key.conj()).real.sum()
        assert found[b, h, i, j] == pytest.approx(expected / np.sqrt(D + width), abs=2e-5)


def test_scaling_rules_change_each_layer_but_those_with_a_window_base():
    rules = "none", "linear:factor=4"
    changes = {"model__pattern": "NEG", "model__num_layers": 3, "model__window": 8, "evaluation__rope_scalings": rules}
    config = run_config("decoupled_rope", encoding__window_base=100.0, **changes)
    model = nnx.eval_shape(lambda: build_model(config, jnp.zeros((), jnp.uint32)))
    assert model.modules == ("without", "encoding_1", "encoding_2")
    base, windowed = ({"inverse_frequencies": frequencies.none(16, x, 64)[0]} for x in (1e4, 100.0))
    constants = {"encoding_1": windowed, "encoding_2": base}
    found = extrapolation.scaled_constants(config, constants, rules[1])
    assert found.keys() == constants.keys()
    assert found["encoding_1"] is windowed
    np.testing.assert_allclose(found["encoding_2"]["inverse_frequencies"], base["inverse_frequencies"] / 4, rtol=1e-6)
    spectra = extrapolation.spectra(config, constants)
    np.testing.assert_allclose(spectra["none"], spectra[rules[1]] * 4, rtol=1e-6)
