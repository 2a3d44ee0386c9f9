"""T5's bias: its buckets, against whole numbers and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims
from posenc_jax.encodings.bias import t5_bucket
from posenc_jax.schema import ConfigError
from tests.encodings.test_bias import bias, build
from tests.small import split


@pytest.mark.parametrize(
    ("distance", "bucket"),
    [
        *[(-3, 0), (0, 0), (15, 15), (16, 16), (18, 16), (19, 17), (20, 17), (24, 19), (32, 21), (48, 24)],
        *[(64, 26), (96, 29), (127, 31), (128, 31), (100_000, 31)],
    ],
)
def test_t5_buckets_are_the_published_ones(distance, bucket):
    assert t5_bucket(jnp.array(distance)) == bucket


@pytest.mark.torch
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 200)])
def test_t5_buckets_equal_hugging_face(buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch = pytest.importorskip("torch")
    bucket = t5.T5Attention._relative_position_bucket
    theirs = bucket(-torch.arange(-50, 1000), bidirectional=False, num_buckets=buckets, max_distance=max_distance)
    np.testing.assert_array_equal(t5_bucket(jnp.arange(-50, 1000), buckets, max_distance), theirs.numpy())


@pytest.mark.torch
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 200)])
def test_t5_of_both_directions_equals_hugging_face(buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch = pytest.importorskip("torch")
    sizes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": max_distance}
    config = t5.T5Config(d_model=16, d_kv=8, num_heads=4, is_decoder=False, **sizes)
    theirs = t5.T5Attention(config, has_relative_attention_bias=True)
    table = torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    encoding = build("t5", buckets=buckets, max_distance=max_distance, bidirectional=True)
    encoding.table[...] = jnp.asarray(table.detach().numpy()) / np.sqrt(8)
    with torch.no_grad():
        expected = theirs.compute_bias(300, 300)[0].numpy()
    np.testing.assert_allclose(bias(encoding, 300), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("buckets", "max_distance", "allowed"),
    [(30, 128, "a multiple of 4"), (32, 8, "a quarter of it below max_distance = 8")],
)
def test_t5_of_both_directions_needs_buckets_for_each(buckets, max_distance, allowed):
    with pytest.raises(ConfigError, match=f"encoding.buckets = {buckets}: must be .*{allowed}"):
        build("t5", buckets=buckets, max_distance=max_distance, bidirectional=True)


def exact_t5_bucket(distance, buckets, max_distance):
    """e + floor(e ln(n/e) / ln(M/e)), at most 2e - 1, by comparing whole powers: (n/e)^e with (M/e)^k."""
    e = buckets // 2
    if distance < e:
        return max(distance, 0)
    steps = [k for k in range(e) if distance**e * e**k >= max_distance**k * e**e]
    return e + max(steps)


@pytest.mark.parametrize(
    ("buckets", "max_distance"),
    [(32, 128), (100, 128), (200, 256), (16, 200), (4, 3), (8, 5), (64, 33), (24, 12 * 2**7), (32, 16 * 81)],
)
def test_t5_buckets_are_exact_at_every_distance(buckets, max_distance):
    distances = range(-3, max_distance + 50)
    expected = [exact_t5_bucket(n, buckets, max_distance) for n in distances]
    np.testing.assert_array_equal(t5_bucket(jnp.arange(-3, max_distance + 50), buckets, max_distance), expected)


@pytest.mark.parametrize(("buckets", "max_distance", "distance", "bucket"), [(100, 128, 80, 75), (200, 256, 160, 150)])
def test_a_t5_bucket_begins_where_its_logarithm_is_whole(buckets, max_distance, distance, bucket):
    found = t5_bucket(jnp.array([distance - 1, distance]), buckets, max_distance)
    assert found.tolist() == [bucket - 1, bucket]


@pytest.mark.parametrize(("head_dim", "factor"), [(64, 8.0), (4, 2.0)])
def test_t5_reads_its_table_by_bucket_times_the_root_of_the_head_dimension(head_dim, factor):
    encoding = encodings.build("t5", Dims(32, 4, 4, head_dim, 64), nnx.Rngs(0))
    found = bias(encoding, 200)
    for i, j in ((5, 5), (30, 10), (199, 0)):
        expected = factor * encoding.table[...][int(t5_bucket(jnp.array(i - j)))]
        np.testing.assert_allclose(found[:, i, j], expected, rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize(("head_dim", "buckets", "max_distance"), [(64, 32, 128), (8, 16, 200)])
def test_t5_equals_x_transformers_in_value_and_gradient(head_dim, buckets, max_distance):
    theirs = pytest.importorskip("x_transformers.x_transformers")
    torch = pytest.importorskip("torch")
    shape = {"dim": 16, "depth": 1, "heads": 4, "attn_dim_head": head_dim, "rel_pos_bias": True}
    original = theirs.Decoder(**shape, rel_pos_num_buckets=buckets, rel_pos_max_distance=max_distance).rel_pos
    table = original.relative_attention_bias.weight
    dims = Dims(16, 4, 4, head_dim, 64)
    encoding = encodings.build("t5", dims, nnx.Rngs(0), buckets=buckets, max_distance=max_distance)
    encoding.table[...] = jnp.asarray(table.detach().numpy())
    expected = original(300, 300)
    worth = np.tril(np.random.default_rng(0).normal(size=expected.shape)).astype(np.float32)
    (expected * torch.tensor(worth)).sum().backward()
    graphdef, params, constants = split(encoding)
    loss = lambda params: (bias(nnx.merge(graphdef, params, constants), 300) * worth).sum()  # noqa: E731
    np.testing.assert_allclose(np.tril(bias(encoding, 300)), np.tril(expected.detach().numpy()), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(params)["table"], table.grad.numpy(), rtol=1e-4, atol=1e-2)


@pytest.mark.torch
def test_t5_of_a_scaled_table_equals_hugging_face_in_value():
    """T5 adds its table to unscaled logits, so our table is T5's divided by sqrt(d)."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch = pytest.importorskip("torch")
    config = t5.T5Config(d_model=16, d_kv=8, num_heads=4, is_decoder=True)
    theirs = t5.T5Attention(config, has_relative_attention_bias=True)
    table = torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    encoding = build("t5")
    encoding.table[...] = jnp.asarray(table.detach().numpy()) / np.sqrt(8)
    with torch.no_grad():
        expected = theirs.compute_bias(300, 300)[0].numpy()
    np.testing.assert_allclose(np.tril(bias(encoding, 300)), np.tril(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("buckets", "max_distance"), [(31, 128), (32, 16)])
def test_t5_refuses_buckets_that_do_not_fit(buckets, max_distance):
    with pytest.raises(ConfigError, match="max_distance"):
        build("t5", buckets=buckets, max_distance=max_distance)
