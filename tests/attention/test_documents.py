"""Attention within documents: every algorithm computes what dense attention computes for each document alone."""

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
    q, k, v = (jax.random.normal(key, (2, 37, 4, 8)) for key in keys[:3])
    return q, k, v, jax.random.normal(keys[3], (2, 37, 16))


def alone(encoding, q, k, v, x, mask):
    """Dense attention of each document by itself."""
    rows = []
    for row, ends in enumerate(ENDS):
        parts = [slice(start, end) for start, end in zip((0, *ends), ends, strict=False)]
        of_part = ((a[row : row + 1, part] for a in (q, k, v, x)) for part in parts)
        out = [attention(encoding, q, k, v, mask=mask, x=x, attend=dense) for q, k, v, x in of_part]
        rows.append(jnp.concatenate(out, axis=1))
    return jnp.concatenate(rows)


@pytest.mark.parametrize(
    ("attend", "name", "mask"),
    [
        (functools.partial(blockwise, block=8), "rope", AttentionMask(window=7)),
        (functools.partial(blockwise, block=8), "t5", CAUSAL),
        (functools.partial(blockwise, block=8), "fox", CAUSAL),
        (functools.partial(blockwise, block=8), "alibi", ENCODER),
        (functools.partial(right_to_left, block=8), "cope", CAUSAL),
        (functools.partial(right_to_left, block=8), "path", AttentionMask(window=7)),
        (functools.partial(by_query, block=8), "stick_breaking", CAUSAL),
        (functools.partial(by_query, block=8), "wall", AttentionMask(window=7)),
        (functools.partial(by_query, block=8), "rope", ENCODER),
    ],
)
def test_each_algorithm_computes_dense_attention_of_each_document_alone(attend, name, mask):
    encoding = encodings.build(name, DIMS, nnx.Rngs(0))

    def outputs_and_gradients(attention):
        def loss(arrays):
            out = attention(*arrays)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.grad(loss, has_aux=True))(arrays())

    packed = functools.partial(attention, encoding, mask=mask, documents=DOCUMENTS, attend=attend)
    found = outputs_and_gradients(lambda q, k, v, x: packed(q, k, v, x=x))
    expected = outputs_and_gradients(lambda q, k, v, x: alone(encoding, q, k, v, x, mask))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


def test_the_last_queries_see_their_own_document():
    encoding, (q, k, v, _) = encodings.build("alibi", DIMS, nnx.Rngs(0)), arrays()
    whole = attention(encoding, q, k, v, documents=DOCUMENTS)
    np.testing.assert_allclose(attention(encoding, q[:, -14:], k, v, documents=DOCUMENTS), whole[:, -14:], atol=1e-6)


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
    with pytest.raises(ValueError, match="None for PRoPE, which mixes documents"):
        attention(offset, q, k, v, documents=DOCUMENTS)
