"""RoPE and related encodings against transcriptions of their papers, and the identities that they satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims
from posenc_jax.schema import ConfigError


def build(name, head_dim=16, length=64, **hyperparameters):
    return encodings.build(name, Dims(32, 2, 2, head_dim, length), nnx.Rngs(0), **hyperparameters)


def rope(head_dim=16, length=64, **hyperparameters):
    return build("rope", head_dim, length, **hyperparameters)


def queries(head_dim=16, length=64, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, length, 2, head_dim))


def rotated(encoding, q, positions):
    return encoding.rotate(q, q, positions, positions, (None, None))[0]


def logits(encoding, q, k, positions):
    q, k = encoding.rotate(q, k, positions, positions, (None, None))
    return encoding.scores(q, k, (None, None))


@pytest.mark.parametrize(("head_dim", "base"), [(16, 1e4), (64, 500.0)])
def test_interleaved_equals_the_paper(head_dim, base):
    """Equation 15 of Su et al. 2021, computed for one pair of channels and one position at a time in float64."""
    q = np.asarray(queries(head_dim), np.float64)
    expected = np.empty_like(q)
    for t in range(q.shape[1]):
        for m in range(head_dim // 2):
            angle = t * base ** (-2 * m / head_dim)
            rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            expected[:, t, :, 2 * m : 2 * m + 2] = q[:, t, :, 2 * m : 2 * m + 2] @ rotation.T
    encoding = rope(head_dim, base=base, pairing="interleaved")
    np.testing.assert_allclose(rotated(encoding, queries(head_dim), jnp.arange(64)[None]), expected, atol=2e-5)


@pytest.mark.torch
@pytest.mark.parametrize("base", [1e4, 500.0])
def test_half_pairing_equals_hugging_face_forward_and_backward(base):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch = pytest.importorskip("torch")
    encoding, q, positions, worth = rope(base=base), queries(), jnp.arange(64)[None] + 5, queries(seed=1)
    angles = torch.tensor(np.asarray(positions[..., None] * encoding.inverse_frequencies[...]))
    angles = torch.cat([angles, angles], dim=-1)
    theirs = torch.tensor(np.asarray(q), requires_grad=True)
    expected, _ = llama.apply_rotary_pos_emb(*(theirs.transpose(1, 2),) * 2, angles.cos(), angles.sin())
    expected = expected.transpose(1, 2)
    (expected * torch.tensor(np.asarray(worth))).sum().backward()
    np.testing.assert_allclose(rotated(encoding, q, positions), expected.detach().numpy(), atol=1e-5)
    gradient = jax.grad(lambda q: (rotated(encoding, q, positions) * worth).sum())(q)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-5)


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
    [
        *[{}, {"fraction": 0.5}, {"scaling": "linear:factor=4"}, {"scaling": "ntk:factor=4"}],
        *[{"scaling": "yarn:factor=4"}, {"scaling": "longrope:factors=1|1|1|1|2|2|3|4,factor=4"}],
    ],
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
    q, positions = queries(), jnp.arange(64)[None] + 3001  # bfloat16 cannot distinguish 3001 .. 3064
    low = rotated(rope(), q.astype(jnp.bfloat16), positions)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), rotated(rope(), q, positions), atol=0.05)


@pytest.mark.parametrize("hyperparameters", [{"fraction": 0.1}, {"fraction": 0.3125}])
def test_a_width_that_cannot_be_paired_is_refused(hyperparameters):
    with pytest.raises(ConfigError, match="even number of channels"):
        rope(**hyperparameters)


def test_two_bases_share_one_structure():
    assert nnx.graphdef(rope(base=100.0)) == nnx.graphdef(rope(base=1e6))


def turned_at(theta, q):
    """Queries at positions 0, 1, ..., rotated in pairs (m, m + d/2) at given rates, one at a time in float64."""
    q, half = np.asarray(q, np.float64), q.shape[-1] // 2
    expected = np.empty_like(q)
    for t in range(q.shape[1]):
        for m in range(half):
            pair = q[:, t, :, m] + 1j * q[:, t, :, m + half]
            turned = pair * np.exp(1j * t * theta[m])
            expected[:, t, :, m], expected[:, t, :, m + half] = turned.real, turned.imag
    return expected


@pytest.mark.parametrize(
    ("base", "fraction", "is_reversed", "kept"),
    [(1e4, 0.75, False, range(6)), (500.0, 0.3, False, range(2)), (1e4, 0.25, True, range(6, 8))],
)
def test_p_rope_turns_the_fastest_pairs_at_ropes_rates(base, fraction, is_reversed, kept):
    theta = [base ** (-2 * m / 16) if m in kept else 0 for m in range(8)]
    encoding = build("p_rope", base=base, fraction=fraction, reversed=is_reversed)
    np.testing.assert_allclose(
        rotated(encoding, queries(), jnp.arange(64)[None]), turned_at(theta, queries()), atol=2e-5
    )


@pytest.mark.parametrize("is_reversed", [False, True])
def test_p_rope_runs_from_no_encoding_to_rope(is_reversed):
    q, positions = queries(), jnp.arange(64)[None]
    all_pairs = rotated(build("p_rope", fraction=1.0, reversed=is_reversed), q, positions)
    np.testing.assert_array_equal(all_pairs, rotated(rope(), q, positions))
    np.testing.assert_array_equal(rotated(build("p_rope", fraction=0.0, reversed=is_reversed), q, positions), q)


@pytest.mark.parametrize(("fraction", "still"), [(0.5, [4, 5, 6, 7]), (0.25, [2, 3, 4, 5, 6, 7]), (1.0, [])])
def test_keys_take_the_channels_that_are_not_rotated_from_the_token_before(fraction, still):
    k, positions = queries(), jnp.arange(64)[None]
    plain, offset = (build("p_rope", fraction=fraction, key_offset=own) for own in (False, True))
    expected = np.array(plain.rotate(k, k, positions, positions, (None, None))[1])
    for t in range(1, 64):
        for pair in still:
            expected[:, t, :, [pair, pair + 8]] = k[:, t - 1, :, [pair, pair + 8]]
    q_found, k_found = offset.rotate(k, k, positions, positions, (None, None))
    np.testing.assert_array_equal(k_found, expected)
    np.testing.assert_array_equal(q_found, rotated(plain, k, positions))


@pytest.mark.torch
@pytest.mark.parametrize(("head_dim", "fraction"), [(64, 0.25), (128, 0.75), (16, 0.3)])
def test_p_rope_equals_hugging_face(head_dim, fraction):
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters={"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": fraction},
    )
    expected, _ = rope_utils.ROPE_INIT_FUNCTIONS["proportional"](config, "cpu")
    found = build("p_rope", head_dim, fraction=fraction).inverse_frequencies[...]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize(("base", "length"), [(1e4, 64), (100.0, 256)])
def test_hope_turns_only_pairs_that_turn_whole_in_training(base, length):
    theta = [base ** (-2 * m / 16) for m in range(8)]
    theta = [rate if length * rate >= 2 * np.pi else 0 for rate in theta]
    assert 0 < theta.count(0) < 8
    encoding = build("hope", length=length, base=base)
    np.testing.assert_allclose(
        rotated(encoding, queries(), jnp.arange(64)[None]), turned_at(theta, queries()), atol=2e-5
    )


def test_hope_of_a_long_enough_training_length_is_rope():
    encoding = build("hope", length=100_000)
    np.testing.assert_array_equal(encoding.inverse_frequencies[...], rope().inverse_frequencies[...])


def test_learned_rope_starts_as_rope():
    q, positions = queries(), jnp.arange(64)[None]
    np.testing.assert_array_equal(rotated(build("learned_rope"), q, positions), rotated(rope(), q, positions))


@pytest.mark.parametrize("base", [1e4, 500.0])
def test_learned_rope_multiplies_rates_by_the_exponential_of_its_offsets(base):
    encoding = build("learned_rope", base=base)
    offsets = np.random.default_rng(0).normal(size=8)
    encoding.offsets[...] = jnp.asarray(offsets, jnp.float32)
    theta = [base ** (-2 * m / 16) * np.exp(offsets[m]) for m in range(8)]
    np.testing.assert_allclose(
        rotated(encoding, queries(), jnp.arange(64)[None]), turned_at(theta, queries()), atol=1e-4
    )


def test_learned_rope_with_equal_offsets_is_position_interpolation():
    encoding, positions = build("learned_rope"), jnp.arange(64)[None]
    encoding.offsets[...] = jnp.full(8, -np.log(4.0), jnp.float32)
    linear = rotated(rope(scaling="linear:factor=4"), queries(), positions)
    np.testing.assert_allclose(rotated(encoding, queries(), positions), linear, atol=2e-5)


def test_learned_rates_are_one_set_for_all_layers_and_heads():
    (offsets,) = jax.tree.leaves(nnx.state(build("learned_rope"), nnx.Param))
    assert offsets.shape == (8,)
    assert encodings.load("learned_rope").shared


def test_longrope_factors_that_do_not_fit_the_pairs_are_refused():
    with pytest.raises(ConfigError, match=r"encoding.scaling = 'longrope:.*factors must be 8 numbers.*not 2"):
        rope(scaling="longrope:factors=1|2")
