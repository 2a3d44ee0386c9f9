"""Large positions: angles against float64, bfloat16 against float32, and the warning at the limit of float32."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.dense import attention_logits
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import AttentionInputs
from posenc_jax.evaluation import precision
from posenc_jax.schema import ConfigError
from tests.encodings.test_contract import every_encoding
from tests.small import DIMS, run_config

WIDE = dataclasses.replace(DIMS, d_model=64, num_heads=2, num_kv_heads=2, head_dim=32, max_length=256)
# Groups of positions in one window. xPos scales relative to their middle, and its range limits their number.
READ = [0, 1, 255], [131_070, 131_071], [*np.random.default_rng(0).integers(960_000, 10**6, 200), 10**6]
THETA = 10000.0 ** (-np.arange(16) / 16)
SCALINGS = {rule: f"{rule}:factor=4" for rule in ("linear", "ntk", "by_parts", "yarn", "llama3")} | {
    "resonance": "resonance",
    "none": "none",
    "rebased": "rebased:to=1e6",
    "dynamic_ntk": "dynamic_ntk:read=2048",
    "proportional": "proportional:fraction=0.75,factor=4",
    "longrope": "longrope:factors=" + "|".join(str(1 + m / 4) for m in range(16)),
}
RATES = {  # radians per token, in float64
    **{f"rope {scaling}": frequencies.parse(scaling).frequencies(32, 10000.0, 256)[0] for scaling in SCALINGS.values()},
    "p_rope": THETA * (np.arange(16) < 12),
    "hope": np.where(2 * np.pi / 256 <= THETA, THETA, 0),
    "learned_rope": THETA,
    "xpos": THETA,
    "grape_m": THETA,
    "fope": np.where(2 * np.pi / 256 <= THETA, THETA, 0),
    "pope": 10000.0 ** (-np.arange(32) / 32),
    "sinusoidal": 10000.0 ** (-np.arange(32) / 32),
}


def waves(name: str, read: list[int]) -> np.ndarray:
    """cos + i sin of the angles by which an encoding rotates keys, or of the angles that it adds; [T, pairs]."""
    name, _, scaling = name.partition(" ")
    own = {"scaling": scaling} if scaling else {"gain": 0.0} if name == "fope" else {}
    encoding, places = encodings.build(name, WIDE, nnx.Rngs(0), **own), jnp.asarray(read)[None]
    if name == "sinusoidal":
        added = np.asarray(encoding.embed(jnp.zeros((1, len(read), 64)), places)[0], np.float64)
        return added[:, 1::2] + 1j * added[:, ::2]
    k = jnp.broadcast_to(jnp.arange(32) < 16, (1, len(read), 2, 32)).astype(jnp.float32)  # 1 in first channels
    turned = np.asarray(encoding.rotate(k, k, places, places, (None, None))[1][0, :, 0], np.float64)
    cos, sin = np.split(turned, 2, axis=-1)
    return (cos + 1j * sin) / np.hypot(cos, sin)


def test_every_scaling_rule_is_among_those_measured():
    assert SCALINGS.keys() == frequencies.RULES.keys()


@pytest.mark.parametrize("name", RATES)
def test_angles_at_a_million_tokens_are_those_of_float64_but_for_two_roundings(name):
    """The rate is rounded by up to 2^-24 of it, as is its product with the position: at most 0.13 radians in all."""
    for read in READ:
        exact = np.array(read)[:, None] * RATES[name]
        error = np.abs(np.angle(waves(name, read) * np.exp(-1j * exact)))
        bound = 2 * exact * precision.ROUNDING + 4 * 2.0**-24
        assert (error <= bound).all(), (error / bound).max()
        assert bound.max() < 0.13


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in RATES} - {"fope"}))  # FoPE mixes its frequencies
def test_angles_are_no_products_of_matrices(name):
    """By default, a TPU rounds matmul inputs to bfloat16. An angle would be wrong by radians at position 3,001."""
    encoding = encodings.build(name, WIDE, nnx.Rngs(0))

    def placed(x, places):
        heads = encoding.embed(x, places).reshape(1, 8, 2, 32)
        return encoding.rotate(heads, heads, places, places, (None, None))

    program = jax.jit(placed).lower(jnp.ones((1, 8, 64)), jnp.arange(8)[None]).as_text()
    assert "cosine" in program
    assert "dot_general" not in program


@every_encoding
def test_a_bfloat16_model_tells_far_positions_apart_as_well_as_near_ones(name):
    encoding = encodings.build(name, WIDE, nnx.Rngs(1))
    x, q, k = (jax.random.normal(key, (1, 24, 64)) for key in jax.random.split(jax.random.key(0), 3))

    def logits(dtype, start):
        places = start + jnp.arange(24)[None]
        embedded = encoding.embed(x.astype(dtype), places)
        ctx = encoding.prepare(embedded, places)
        moved = embedded - x.astype(dtype)  # an additive encoding of embeddings is then part of queries and keys
        heads = ((y.astype(dtype) + moved).reshape(1, 24, 2, 32) for y in (q, k))
        turned = encoding.rotate(*heads, places, places, ctx)
        z, mask = attention_logits(encoding, AttentionInputs(*turned, turned[1], places, places, ctx))
        return jnp.where(mask, z, 0)

    compiled = jax.jit(logits, static_argnums=0)
    last = encoding.table_length or 131_072
    near, far, near_half, far_half = (
        compiled(dtype, start) for dtype in (jnp.float32, jnp.bfloat16) for start in (0, last - 24)
    )
    rounding = jnp.abs(near_half - near).max()
    assert rounding < (0.2 if name == "tapa" else 0.06)  # its phase multiplies the rounding of a logit by 2 pi
    assert jnp.abs(far_half - far).max() < 2 * rounding
    if encoding.relative:
        assert jnp.abs(far - near).max() < 0.01


def warnings(caplog, config):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        precision.warn(config)
    return [record.getMessage() for record in caplog.records]


def test_a_run_past_what_float32_resolves_is_warned_once(caplog):
    assert warnings(caplog, run_config("rope", evaluation__lengths=(64, 131_072))) == []
    (line,) = warnings(caplog, run_config("rope", evaluation__lengths=(64, 10**6)))
    assert line == (
        "config.evaluation.lengths = (64, 1000000): float32 holds angles of up to 1 radians per token to 0.06 radians "
        "there; keep positions below 167772"
    )
    assert (
        warnings(caplog, run_config("rope", evaluation__lengths=(64, 10**6), positions__evaluation="interpolated"))
        == []
    )


@pytest.mark.parametrize("schedule", [{"training": "random_float"}, {"evaluation": "even"}])
def test_a_range_of_positions_past_what_float32_resolves_is_refused(schedule, caplog):
    changes = {f"positions__{name}": value for name, value in schedule.items()}
    assert warnings(caplog, run_config("alibi", positions__range=10**7, **changes)) == []
    with pytest.raises(ConfigError, match="up to which float32 counts positions"):
        run_config("alibi", positions__range=10**8, **changes)
