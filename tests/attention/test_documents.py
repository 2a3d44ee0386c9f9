"""Attention within documents: every algorithm computes what dense attention does, and kernels are not used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention import attention
from posenc_jax.attention.blockwise import blockwise
from posenc_jax.attention.by_query import by_query
from posenc_jax.attention.dense import dense
from posenc_jax.attention.dispatch import accelerated
from posenc_jax.attention.right_to_left import right_to_left
from posenc_jax.attention.target import Target
from posenc_jax.encodings.base import CAUSAL, AttentionInputs, AttentionMask
from tests.attention.rows import DIMS

ENDS = ((9, 10, 26, 37), (16, 37))  # of the documents in each of two windows
DOCUMENTS = jnp.stack([jnp.searchsorted(jnp.array(ends), jnp.arange(37), side="right") for ends in ENDS])
ENCODER = AttentionMask(causal=False)


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 37, 2, 8)) for key in keys[:3])
    return q, k, v, jax.random.normal(keys[3], (2, 37, 16))


@pytest.mark.parametrize(
    ("attend", "name", "mask", "hyperparameters"),
    [
        (functools.partial(blockwise, block=8), "rope", AttentionMask(window=7), {}),
        (functools.partial(blockwise, block=8), "t5", CAUSAL, {}),
        (functools.partial(blockwise, block=8), "fox", CAUSAL, {}),
        (functools.partial(blockwise, block=8), "alibi", ENCODER, {}),
        (functools.partial(right_to_left, block=8), "cope", CAUSAL, {}),
        (functools.partial(right_to_left, block=8), "path", AttentionMask(window=7), {}),
        (functools.partial(by_query, block=8), "stick_breaking", CAUSAL, {}),
        (functools.partial(by_query, block=8), "wall", CAUSAL, {"bias_init": -8.0}),
        (functools.partial(by_query, block=8), "rope", ENCODER, {}),
    ],
)
def test_each_algorithm_computes_what_dense_attention_does(attend, name, mask, hyperparameters):
    encoding = encodings.build(name, DIMS, nnx.Rngs(0), **hyperparameters)

    def outputs_and_gradients(attend):
        def loss(q, k, v, x):
            out = attention(encoding, q, k, v, mask=mask, x=x, documents=DOCUMENTS, attend=attend)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.grad(loss, range(4), has_aux=True))(*arrays())

    found, expected = outputs_and_gradients(attend), outputs_and_gradients(dense)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, equal_nan=False), found, expected)


def test_the_last_queries_see_their_own_document():
    encoding, (q, k, v, _) = encodings.build("alibi", DIMS, nnx.Rngs(0)), arrays()
    whole = attention(encoding, q, k, v, documents=DOCUMENTS)
    listed = DOCUMENTS.tolist()  # any array, as for positions
    np.testing.assert_allclose(attention(encoding, q[:, -14:], k, v, documents=listed), whole[:, -14:], atol=1e-6)


def test_kernels_leave_documents_to_the_portable_algorithms():
    encoding, (q, k, v, _) = encodings.build("rope", DIMS, nnx.Rngs(0)), arrays()
    positions, half = jnp.arange(37)[None], (x.astype(jnp.bfloat16) for x in (q, k, v))
    inputs = AttentionInputs(*half, positions, positions)
    packed = inputs._replace(documents=(DOCUMENTS, DOCUMENTS))
    for device in (Target("gpu", "9.0"), Target("tpu")):
        assert accelerated(encoding, packed, CAUSAL, device) is None


def test_documents_that_do_not_fit_are_refused():
    encoding, (q, k, v, _) = encodings.build("rope", DIMS, nnx.Rngs(0)), arrays()
    for documents, found in ((DOCUMENTS[:, 1:], r"int32\[2, 36\]"), (DOCUMENTS.astype(float), r"float32\[2, 37\]")):
        with pytest.raises(ValueError, match=rf"documents = '{found}': must be int32\[2, 37\]"):
            attention(encoding, q, k, v, documents=documents)
    offset = encodings.build("p_rope", DIMS, nnx.Rngs(0), key_offset=True)
    with pytest.raises(ValueError, match="None for PRoPE, which reads other documents"):
        attention(offset, q, k, v, documents=DOCUMENTS)
