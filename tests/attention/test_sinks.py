"""Sinks under every algorithm, against a softmax with one more column."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention import attention
from posenc_jax.attention.blockwise import blockwise
from posenc_jax.attention.by_query import by_query
from posenc_jax.attention.dense import attention_logits, attention_weights, dense
from posenc_jax.attention.dispatch import accelerated, on_rows
from posenc_jax.attention.pallas.kernel import kernel
from posenc_jax.attention.pallas.tpu_kernel import tpu_kernel
from posenc_jax.attention.right_to_left import right_to_left
from posenc_jax.attention.target import Target
from posenc_jax.distributed.sharding import make_mesh
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, Dims
from posenc_jax.evaluation.attention_stats import logit_max_and_entropy
from tests.small import transformer

DIMS = Dims(d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, max_length=64)
SINKS = jnp.array([-1.0, 0.0, 1.0, 3.0])
ALGORITHMS = {
    "dense": ("fire", dense),
    "blockwise": ("fire", functools.partial(blockwise, block=16)),
    "blockwise by distance": ("alibi", functools.partial(blockwise, block=16)),
    "by_query": ("cope", functools.partial(by_query, block=8)),
    "right_to_left": ("grape_ap", functools.partial(right_to_left, block=16)),
    "kernel": ("kerple", functools.partial(kernel, block=16, interpret=True)),
    "kernel without bias": ("none", functools.partial(kernel, block=16, interpret=True)),
    "tpu_kernel": ("kerple", functools.partial(tpu_kernel, block=16, interpret=True)),
}


def arrays(length=40):
    keys = jax.random.split(jax.random.key(1), 4)
    q, k, v = (jax.random.normal(key, (2, length, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=False))
    return q, k, v, jax.random.normal(keys[3], (2, length, 16))


def with_a_column(encoding, inputs, mask):
    """The softmax over the logits and one more, whose weight goes to no value."""
    logits, seen = attention_logits(encoding, inputs, mask)
    sinks = jnp.broadcast_to(inputs.sinks[:, None, None], (*logits.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([jnp.where(seen, logits, -jnp.inf), sinks], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bhts,bshe->bthe", weights, jnp.repeat(inputs.v, 2, axis=2))


@pytest.mark.parametrize(("window", "queries"), [(None, 21), (7, 40)])
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_every_algorithm_has_a_column_more(kind, window, queries):
    name, attend = ALGORITHMS[kind]
    encoding, mask = encodings.build(name, DIMS, nnx.Rngs(0)), AttentionMask(window=window)

    @functools.partial(jax.jit, static_argnums=0)
    def value(attend, sinks, q, k, v, x):
        def total(sinks, q, k, v):
            out = attention(encoding, q[:, -queries:], k, v, mask=mask, x=x, sinks=sinks, attend=attend)
            return jnp.sin(out).sum(), out

        return jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(sinks, q, k, v)

    (_, expected), gradients = value(with_a_column, SINKS, *arrays())
    (_, found), own = value(attend, SINKS, *arrays())
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for one, other in zip(own, gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    assert jnp.abs(own[0]).min() > 1e-4  # the sinks are trained


@pytest.mark.torch
@pytest.mark.parametrize("length", [9, 40])
def test_attention_equals_that_of_gpt_oss(length):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v, _ = arrays(length)
    module = SimpleNamespace(num_key_value_groups=2, sinks=torch.tensor(np.asarray(SINKS)), training=False)
    heads_first = [torch.tensor(np.asarray(x).swapaxes(1, 2)) for x in (q, k, v)]
    mask = torch.full((length, length), float("-inf")).triu(1)
    expected, _ = theirs.eager_attention_forward(module, *heads_first, mask, scaling=8**-0.5)
    found = attention(encodings.build("none", DIMS, nnx.Rngs(0)), q, k, v, sinks=SINKS)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_without_sinks_weights_sum_to_one_and_with_them_to_less():
    encoding, (q, k, v, _) = encodings.build("rope", DIMS, nnx.Rngs(0)), arrays(9)
    places = jnp.arange(9)[None]
    inputs = AttentionInputs(q, k, v, places, places)
    np.testing.assert_allclose(attention_weights(encoding, inputs).sum(axis=-1), 1, atol=1e-6)
    sums = attention_weights(encoding, inputs._replace(sinks=SINKS)).sum(axis=-1)
    assert (sums < 1).all()
    assert (jnp.diff(sums.mean(axis=(0, 2))) < 0).all()  # a larger sink takes more
    np.testing.assert_allclose(
        attention_weights(encoding, inputs._replace(sinks=SINKS - 100)).sum(axis=-1), 1, atol=1e-6
    )


def test_devices_that_divide_rows_have_all_sinks():
    encoding, (q, k, v, _) = encodings.build("rope", DIMS, nnx.Rngs(0)), arrays()
    with jax.set_mesh(make_mesh(2, jax.devices()[:2])):
        attend = on_rows(blockwise, 2)
        divided = jax.jit(functools.partial(attention, encoding, attend=attend))(q, k, v, sinks=SINKS)
    np.testing.assert_allclose(divided, attention(encoding, q, k, v, sinks=SINKS, attend=with_a_column), atol=2e-5)


def test_kernels_without_sinks_of_their_own_are_not_chosen():
    encoding, (q, k, v, _) = encodings.build("rope", DIMS, nnx.Rngs(0)), arrays()
    places = jnp.arange(40)[None]
    inputs = AttentionInputs(*(x.astype(jnp.bfloat16) for x in (q, k, v)), places, places)
    with jax.set_mesh(make_mesh(1, jax.devices()[:1])):
        for sinks, chosen in ((None, "fused"), (SINKS, "kernel")):
            found = accelerated(encoding, inputs._replace(sinks=sinks), AttentionMask(), Target("gpu", "9.0"))
            assert chosen in found.__module__


def test_statistics_know_the_sinks():
    encoding, (q, k, v, _) = encodings.build("rope", DIMS, nnx.Rngs(0)), arrays()
    places = jnp.arange(40)[None]
    inputs = AttentionInputs(q, k, v, places, places, sinks=SINKS)
    weights = np.asarray(attention_weights(encoding, inputs), np.float64)
    entropy = -np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-30)), 0).sum(axis=-1)
    found = logit_max_and_entropy(encoding, inputs, AttentionMask())
    np.testing.assert_allclose(found[..., 1], np.swapaxes(entropy, 1, 2), atol=1e-5)


def test_a_model_trains_its_sinks():
    model = transformer("rope", attention_sinks=True)
    grads = nnx.grad(lambda model: model(jnp.arange(12)[None]).std())(model)
    for layer in range(2):
        assert model.block(layer).attention.sinks[...].shape == (4,)
        assert jnp.abs(grads[f"block_{layer}"].attention.sinks[...]).min() > 0


@pytest.mark.parametrize(
    ("name", "sinks", "message"),
    [
        ("rope", jnp.zeros(3), r"sinks = 'float32\[3\]': must be float32\[4\], one per attention head"),
        ("rope", jnp.zeros(4, jnp.bfloat16), r"sinks = 'bfloat16\[4\]': must be float32\[4\]"),
        ("stick_breaking", SINKS, "sinks = .*: must be None for StickBreaking, which has no softmax"),
    ],
)
def test_bad_sinks_are_refused(name, sinks, message):
    encoding, (q, k, v, x) = encodings.build(name, DIMS, nnx.Rngs(0)), arrays()
    with pytest.raises(ValueError, match=message):
        attention(encoding, q, k, v, x=x, sinks=sinks)
