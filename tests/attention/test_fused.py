"""Fused attention equals dense attention in value and every gradient, tested with stand-ins for device kernels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.dense import dense
from posenc_jax.attention.fused import on_gpu, on_tpu, runs
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, Dims, Encoding
from tests.attention.rows import assert_kernel_in_bfloat16_is_as_close_as_dense

DIMS = Dims(d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, max_length=64)
NONE = Encoding(Encoding.Config(), DIMS, nnx.Rngs(0))


def compare(attend, attention_mask, length, queries, width=20, value_width=12):
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (2, queries, 4, width))
    k = jax.random.normal(keys[1], (2, length, 2, width))
    v = jax.random.normal(keys[2], (2, length, 2, value_width))
    positions = jnp.arange(length)[None]

    def loss(attend, *arrays):
        inputs = AttentionInputs(*arrays, positions[:, -queries:], positions)
        out = attend(inputs, attention_mask)
        return jnp.sin(out).sum(), out

    def reference(inputs, attention_mask):
        return dense(NONE, inputs, attention_mask)

    value = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    (_, expected), expected_gradients = value(reference, q, k, v)
    (_, found), gradients = value(attend, q, k, v)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("widths", [(16, 16), (20, 12), (8, 20)], ids=str)
@pytest.mark.parametrize(
    "attention_mask",
    [AttentionMask(), AttentionMask(window=1), AttentionMask(window=30), AttentionMask(causal=False)],
    ids=str,
)
def test_the_call_for_cudnn_equals_dense(attention_mask, widths):
    compare(functools.partial(on_gpu, implementation="xla"), attention_mask, 90, 90, *widths)


def test_the_call_for_cudnn_equals_dense_where_fewer_queries_see_all_keys():
    compare(functools.partial(on_gpu, implementation="xla"), AttentionMask(causal=False), 90, 37)


def test_cudnn_is_asked_for(monkeypatch):
    asked = {}

    def record(q, k, v, **options):
        asked.update(options, shapes=[x.shape for x in (q, k, v)])
        return v

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    q, v, positions = jnp.ones((1, 10, 2, 20)), jnp.ones((1, 10, 2, 12)), jnp.arange(10)[None]
    ten = AttentionInputs(q, q, v, positions, positions)
    assert on_gpu(ten, AttentionMask(window=3)).shape == v.shape
    assert asked["implementation"] == "cudnn"
    assert asked["local_window_size"] == (2, 0)
    assert asked["scale"] == pytest.approx(1 / math.sqrt(20))
    assert asked["shapes"] == [(1, 10, 2, 24)] * 3


@pytest.mark.parametrize(
    "attention_mask", [AttentionMask(), AttentionMask(window=1), AttentionMask(window=30)], ids=str
)
@pytest.mark.parametrize(("length", "queries"), [(90, 90), (190, 37), (640, 640)])
def test_splash_attention_equals_dense(attention_mask, length, queries):
    compare(functools.partial(on_tpu, interpret=True), attention_mask, length, queries)


def test_splash_attention_equals_dense_with_keys_ahead():
    compare(functools.partial(on_tpu, interpret=True), AttentionMask(causal=False), 256, 100)


@pytest.mark.parametrize("widths", [(64, 64), (136, 40)], ids=str)
def test_splash_attention_equals_dense_at_widths_that_fill_no_lanes(widths):
    """A row of a TPU vector register has 128 lanes."""
    compare(functools.partial(on_tpu, interpret=True), AttentionMask(), 130, 130, *widths)


def test_splash_attention_in_bfloat16_is_as_close_to_float32_as_dense_is():
    def attend(encoding, inputs, attention_mask):
        return on_tpu(inputs, attention_mask, interpret=True)

    assert_kernel_in_bfloat16_is_as_close_as_dense(attend, "none")


@pytest.mark.parametrize("width", [20, 64, 128, 136])
def test_splash_attention_lowers_for_a_tpu(width):
    def loss(q, k, v):
        positions = jnp.arange(300)[None]
        inputs = AttentionInputs(q, k, v, positions, positions)
        return on_tpu(inputs, AttentionMask(window=70)).astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((2, 300, heads, width), jnp.bfloat16) for heads in (4, 2))
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


def inputs(length=64, queries=64, width=8, value_width=8, dtype=jnp.bfloat16):
    q = jnp.zeros((2, queries, 4, width), dtype)
    k, v = (jnp.zeros((2, length, 2, n), dtype) for n in (width, value_width))
    positions = jnp.arange(length)[None]
    return AttentionInputs(q, k, v, positions[:, -queries:], positions)


@pytest.mark.parametrize(
    ("on_gpu", "on_tpu", "attention_mask", "sizes"),
    [
        (True, True, AttentionMask(), {}),
        (True, True, AttentionMask(window=9), {}),
        (True, True, AttentionMask(), {"length": 63, "queries": 63}),
        (True, True, AttentionMask(), {"width": 20, "value_width": 128}),
        (True, True, AttentionMask(), {"dtype": jnp.float16}),
        (False, True, AttentionMask(), {"dtype": jnp.float32}),
        (False, True, AttentionMask(), {"queries": 40}),
        (False, True, AttentionMask(), {"width": 136}),
        (False, True, AttentionMask(), {"value_width": 136}),
        (True, False, AttentionMask(causal=False), {"queries": 40}),
        (True, True, AttentionMask(causal=False), {"length": 128}),
    ],
)
def test_attention_runs_where_the_libraries_allow_it(on_gpu, on_tpu, attention_mask, sizes):
    assert runs(NONE, inputs(**sizes), attention_mask, "gpu") == on_gpu
    assert runs(NONE, inputs(**sizes), attention_mask, "tpu") == on_tpu
    assert not runs(NONE, inputs(**sizes), attention_mask, "cpu")


def test_attention_runs_for_encodings_that_leave_logits_as_they_are():
    fit = {name for name in encodings.names() if runs(build(name), inputs(), AttentionMask(), "gpu")}
    assert {"none", "sinusoidal", "learned", "rope", "xpos", "fope", "pope", "selective_rope", "grape_m"} <= fit
    assert not fit & {"alibi", "t5", "fire", "fox", "cope", "path", "shaw", "stick_breaking", "wall"}


def build(name):
    return encodings.build(name, DIMS, nnx.Rngs(0))
