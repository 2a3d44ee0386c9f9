"""The interpreted TPU kernels equal dense attention in value and every gradient, and they lower for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax import encodings
from posenc_jax.attention.pallas import kernel as gpu
from posenc_jax.attention.pallas.tpu_kernel import _toeplitz, _toeplitz_sums, block_length, runs, tpu_kernel
from posenc_jax.encodings.base import AttentionMask, DistanceBias, overrides
from tests.attention.rows import (
    CONTIGUOUS,
    GROUPED,
    abstract,
    assert_kernel_equals_dense,
    assert_kernel_in_bfloat16_is_as_close_as_dense,
    assert_members_of_a_stack_equal_each_alone,
    assert_skips_blocks_ahead,
    assert_skips_blocks_before_the_window,
    inputs,
    lowered_gradient,
)

BUILT = {name: abstract(name, dims=GROUPED) for name in encodings.names()}
WITH_BIAS = [name for name, x in BUILT.items() if overrides(x, "bias") and runs(x, inputs(), CONTIGUOUS)]

# All encodings with a bias by distance share one program.
PROGRAMS = ["rope", "t5", *(name for name in WITH_BIAS if not isinstance(BUILT[name], DistanceBias))]

interpreted = functools.partial(tpu_kernel, block=16, interpret=True)
compare = functools.partial(assert_kernel_equals_dense, interpreted)


@pytest.mark.parametrize("name", ["rope", *WITH_BIAS])
def test_kernel_equals_dense_in_value_and_every_gradient(name):
    compare(name, 45, 30)


@pytest.mark.parametrize(
    ("name", "length", "queries"),
    [("t5", 32, 32), ("t5", 12, 12), ("fire", 50, 1)],
    ids=["whole blocks", "less than a block", "one query"],
)
def test_kernel_equals_dense_at_any_lengths(name, length, queries):
    compare(name, length, queries)


@pytest.mark.parametrize(("window", "queries"), [(1, 61), (17, 37)])
def test_kernel_equals_dense_under_a_window(window, queries):
    compare("t5", 61, queries, AttentionMask(window=window, contiguous=True))


def test_kernel_equals_dense_with_keys_ahead():
    compare("rope", 45, 20, AttentionMask(causal=False))


@pytest.mark.parametrize("name", ["fire", "grape_a"])
def test_pairwise_biases_follow_positions_that_are_not_contiguous(name):
    positions = jnp.cumsum(jax.random.uniform(jax.random.key(2), (2, 40), minval=0.5, maxval=9), axis=1)
    compare(name, 40, 40, AttentionMask(), positions)


@pytest.mark.parametrize("name", ["t5", "fox"])
def test_bfloat16_is_as_close_to_float32_as_dense_is(name):
    assert_kernel_in_bfloat16_is_as_close_as_dense(interpreted, name)


def test_blocks_that_no_query_sees_are_not_computed():
    assert_skips_blocks_ahead(interpreted, "t5")
    assert_skips_blocks_before_the_window(interpreted, "t5")


def test_members_of_a_stack_equal_each_alone():
    assert_members_of_a_stack_equal_each_alone(interpreted)


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [*((name, 64, jnp.bfloat16) for name in PROGRAMS), ("t5", 20, jnp.float32), ("fire", 256, jnp.float32)],
)
def test_kernels_lower_for_a_tpu(name, head_dim, dtype):
    """The forward and backward passes lower to Mosaic without a TPU, also for stacked runs."""
    text = lowered_gradient(tpu_kernel, name, head_dim, dtype, "tpu", ("TPU v5 lite", 1, "tpu"))
    for kernel in ("output", "gradient_of_queries", "gradient_of_keys"):
        assert f'kernel_name = "attention_{kernel}"' in text


@pytest.mark.parametrize("size", [8, 64])
def test_a_toeplitz_block_and_its_gradient(size):
    x, weights = (jnp.asarray(np.random.default_rng(0).normal(size=n)) for n in ((1, 2 * size), (size, size)))
    row, column = np.indices((size, size))
    expected, pull_back = jax.vjp(lambda x: x[0, (column - row) % (2 * size)], x)
    np.testing.assert_array_equal(jax.jit(_toeplitz, static_argnums=1)(x, size), expected)
    np.testing.assert_allclose(jax.jit(_toeplitz_sums)(weights), *pull_back(weights), atol=1e-5)


def test_blocks_are_as_long_as_lengths_in_whole_lanes_and_widths_allow():
    def length(queries, keys, width=64, dtype=jnp.bfloat16):
        return block_length(*(jnp.zeros((1, n, 1, width), dtype) for n in (queries, keys, keys)))

    assert [length(n, n) for n in (1, 128, 130, 300, 1024, 1100)] == [128, 128, 256, 128, 512, 128]
    assert [length(n, 8192) for n in (1, 512)] == [128, 512]
    assert [length(1024, 1024, width, jnp.float32) for width in (128, 132, 512)] == [512, 256, 256]


def test_encodings_with_a_bias_that_the_kernels_run():
    assert set(WITH_BIAS) >= {
        "alibi",
        "kerple",
        "sandwich",
        "t5",
        "fire",
        "dynamic_bias",
        "fox",
        "fox_fixed",
        "grape_a",
    }


def test_kernels_run_for_what_those_of_a_gpu_run_for():
    for encoding in BUILT.values():
        for attention_mask in (CONTIGUOUS, AttentionMask(), AttentionMask(causal=False, contiguous=True)):
            assert runs(encoding, inputs(), attention_mask) == gpu.runs(encoding, inputs(), attention_mask)
        assert not runs(encoding, inputs(width=516), CONTIGUOUS)
        assert not runs(encoding, inputs(value_width=516), CONTIGUOUS)
