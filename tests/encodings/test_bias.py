"""ALiBi, T5 and FIRE against golden numbers and transcriptions of their papers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims
from posenc_jax.encodings.bias import alibi_slopes, t5_bucket
from posenc_jax.schema import ConfigError

EIGHT = [2.0**-h for h in range(1, 9)]


def build(name, num_heads=4, length=64, **hyperparameters):
    return encodings.build(name, Dims(32, num_heads, num_heads, 8, length), nnx.Rngs(0), **hyperparameters)


def bias(encoding, length, offset=0):
    positions = jnp.arange(length)[None] + offset
    return encoding.bias(None, None, None, positions, positions, (None, None))[0]


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (8, EIGHT),
        (6, [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]),
        (12, [*EIGHT, 0.70710678, 0.35355339, 0.1767767, 0.08838835]),
        (1, [2.0**-8]),
    ],
)
def test_alibi_slopes_are_the_published_ones(num_heads, expected):
    np.testing.assert_allclose(alibi_slopes(num_heads), expected, rtol=1e-6)


@pytest.mark.parametrize("num_heads", [4, 12, 40])
def test_alibi_equals_bloom(num_heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    torch = pytest.importorskip("torch")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 20), num_heads, torch.float32).reshape(num_heads, 1, 20).numpy()
    ours = bias(build("alibi", num_heads), 20)
    # Theirs grows with the key's position; the two differ by a constant in each row, which softmax ignores.
    np.testing.assert_allclose(ours - ours[..., :1], np.broadcast_to(theirs, ours.shape) - theirs[..., :1], atol=1e-5)


@pytest.mark.parametrize("exponent", [8.0, 4.0])
def test_alibi_bias_is_minus_slope_times_distance(exponent):
    found = bias(build("alibi", max_exponent=exponent), 10)
    for h in range(4):
        for i in range(10):
            for j in range(i + 1):
                assert found[h, i, j] == pytest.approx(-(2 ** (-exponent * (h + 1) / 4)) * (i - j), rel=1e-6)


@pytest.mark.parametrize(
    ("distance", "bucket"),
    [
        *[(-3, 0), (0, 0), (15, 15), (16, 16), (18, 16), (19, 17), (20, 17), (24, 19), (32, 21), (48, 24)],
        *[(64, 26), (96, 29), (127, 31), (128, 31), (100_000, 31)],
    ],
)
def test_t5_buckets_are_the_published_ones(distance, bucket):
    assert t5_bucket(jnp.array(distance)) == bucket


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 200)])
def test_t5_buckets_equal_hugging_face(buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch = pytest.importorskip("torch")
    bucket = t5.T5Attention._relative_position_bucket
    theirs = bucket(-torch.arange(-50, 1000), bidirectional=False, num_buckets=buckets, max_distance=max_distance)
    np.testing.assert_array_equal(t5_bucket(jnp.arange(-50, 1000), buckets, max_distance), theirs.numpy())


def test_t5_reads_its_table_by_bucket():
    encoding = build("t5")
    found = bias(encoding, 200)
    for i, j in ((5, 5), (30, 10), (199, 0)):
        expected = encoding.table[...][int(t5_bucket(jnp.array(i - j)))]
        np.testing.assert_array_equal(found[:, i, j], expected)


@pytest.mark.parametrize(("buckets", "max_distance"), [(31, 128), (32, 16)])
def test_t5_refuses_buckets_that_do_not_fit(buckets, max_distance):
    with pytest.raises(ConfigError, match="max_distance"):
        build("t5", buckets=buckets, max_distance=max_distance)


@pytest.mark.parametrize("hyperparameters", [{}, {"width": 8, "c": 1.0, "threshold": 20.0}])
def test_fire_equals_its_equation(hyperparameters):
    encoding = build("fire", **hyperparameters)
    c, threshold = hyperparameters.get("c", 0.1), hyperparameters.get("threshold", 512.0)
    arrays = encoding.hidden.kernel, encoding.hidden.bias, encoding.out.kernel
    w1, b1, w2 = (np.asarray(array[...], np.float64) for array in arrays)
    found = bias(encoding, 40)
    for i in range(40):
        for j in range(i + 1):
            share = math.log(c * (i - j) + 1) / math.log(c * max(i, threshold) + 1)
            expected = np.maximum(share * w1[0] + b1, 0) @ w2
            np.testing.assert_allclose(found[:, i, j], expected, atol=1e-5)


def test_fire_is_toeplitz_up_to_its_threshold_only():
    encoding = build("fire", threshold=20.0)
    share = encoding.normalized_distance(jnp.arange(60)[None], jnp.arange(60)[None])[0]
    assert share.min() == 0
    assert share.max() == pytest.approx(1)
    np.testing.assert_allclose(share[10, 5], share[20, 15])
    assert abs(share[50, 45] - share[20, 15]) > 0.01
