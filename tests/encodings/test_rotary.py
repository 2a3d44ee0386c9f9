"""RoPE against a transcription of its paper, and its identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims
from posenc_jax.schema import ConfigError


def rope(head_dim=16, length=64, **hyperparameters):
    return encodings.build("rope", Dims(32, 2, 2, head_dim, length), nnx.Rngs(0), **hyperparameters)


def queries(head_dim=16, length=64, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, length, 2, head_dim))


def rotated(encoding, q, positions):
    return encoding.rotate(q, q, positions, positions, (None, None))[0]


def logits(encoding, q, k, positions):
    q, k = encoding.rotate(q, k, positions, positions, (None, None))
    return encoding.scores(q, k, (None, None))


@pytest.mark.parametrize(("head_dim", "base"), [(16, 1e4), (64, 500.0)])
def test_interleaved_equals_the_paper(head_dim, base):
    """Su et al. 2021, equation 15, one pair of channels and one position at a time, in float64."""
    q = np.asarray(queries(head_dim), np.float64)
    expected = np.empty_like(q)
    for t in range(q.shape[1]):
        for m in range(head_dim // 2):
            angle = t * base ** (-2 * m / head_dim)
            rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            expected[:, t, :, 2 * m : 2 * m + 2] = q[:, t, :, 2 * m : 2 * m + 2] @ rotation.T
    encoding = rope(head_dim, base=base, pairing="interleaved")
    np.testing.assert_allclose(rotated(encoding, queries(head_dim), jnp.arange(64)[None]), expected, atol=2e-5)


def test_half_pairing_equals_hugging_face():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch = pytest.importorskip("torch")
    q, positions = queries(), jnp.arange(64)[None] + 5
    angles = torch.tensor(np.asarray(positions[..., None] * rope().inverse_frequencies[...]))
    angles = torch.cat([angles, angles], dim=-1)
    expected, _ = llama.apply_rotary_pos_emb(
        *(torch.tensor(np.asarray(q)).transpose(1, 2),) * 2, angles.cos(), angles.sin()
    )
    np.testing.assert_allclose(rotated(rope(), q, positions), expected.transpose(1, 2).numpy(), atol=1e-5)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_pairings_agree_after_one_permutation_of_channels(fraction):
    width = int(16 * fraction)
    order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2), np.arange(width, 16)])
    q, k, positions = queries(seed=0), queries(seed=1), jnp.arange(64)[None]
    interleaved = logits(rope(pairing="interleaved", fraction=fraction), q, k, positions)
    half = logits(rope(pairing="half", fraction=fraction), q[..., order], k[..., order], positions)
    np.testing.assert_allclose(interleaved, half, atol=1e-5)
    unpermuted = logits(rope(pairing="half", fraction=fraction), q, k, positions)
    assert jnp.abs(interleaved - unpermuted).max() > 0.5


@pytest.mark.parametrize(
    "hyperparameters",
    [{}, {"fraction": 0.5}, {"scaling": "linear:factor=4"}, {"scaling": "ntk:factor=4"}, {"scaling": "yarn:factor=4"}],
)
def test_logits_depend_on_distance_only(hyperparameters):
    q, k, positions = queries(seed=0), queries(seed=1), jnp.arange(64)[None]
    encoding = rope(**hyperparameters)
    moved = logits(encoding, q, k, positions + 1000)
    np.testing.assert_allclose(logits(encoding, q, k, positions), moved, atol=2e-3)


def test_linear_scaling_equals_dividing_positions():
    q = queries()
    interpolated = rotated(rope(scaling="linear:factor=4"), q, jnp.arange(64)[None] * 4)
    np.testing.assert_allclose(interpolated, rotated(rope(), q, jnp.arange(64)[None]), atol=1e-5)


def test_partial_rotation_spans_the_full_range_of_frequencies():
    q, positions = queries(), jnp.arange(64)[None]
    partial = rotated(rope(fraction=0.5), q, positions)
    np.testing.assert_array_equal(partial[..., 8:], q[..., 8:])
    np.testing.assert_allclose(partial[..., :8], rotated(rope(head_dim=8), q[..., :8], positions), atol=1e-6)


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_yarn_scales_logits_by_its_temperature(factor):
    q, zero = queries(), jnp.zeros((1, 64), jnp.int32)
    temperature = (0.1 * np.log(factor) + 1) ** 2
    scaled = logits(rope(scaling=f"yarn:factor={factor}"), q, q, zero)
    np.testing.assert_allclose(scaled, temperature * logits(rope(), q, q, zero), atol=1e-4)


@pytest.mark.parametrize("position", [131_071, 1_000_000])
def test_angles_stay_within_float32_rounding_of_float64(position):
    encoding = rope(head_dim=64)
    q = jnp.ones((1, 1, 1, 64))
    found = encoding.rotate(q, q, jnp.full((1, 1), position), jnp.full((1, 1), position), (None, None))[0][0, 0, 0]
    angles = position * 1e4 ** (-np.arange(0, 64, 2) / 64)
    expected = np.concatenate([np.cos(angles) - np.sin(angles), np.cos(angles) + np.sin(angles)])
    np.testing.assert_allclose(found, expected, atol=2 * position * 2**-23)


def test_bfloat16_queries_are_rotated_by_float32_angles():
    q, positions = queries(), jnp.arange(64)[None] + 3001  # no bfloat16 holds 3001 .. 3064 apart
    low = rotated(rope(), q.astype(jnp.bfloat16), positions)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), rotated(rope(), q, positions), atol=0.05)


@pytest.mark.parametrize("hyperparameters", [{"fraction": 0.1}, {"fraction": 0.3125}])
def test_a_width_that_cannot_be_paired_is_refused(hyperparameters):
    with pytest.raises(ConfigError, match="even number of channels"):
        rope(**hyperparameters)


def test_two_bases_share_one_structure():
    assert nnx.graphdef(rope(base=100.0)) == nnx.graphdef(rope(base=1e6))
