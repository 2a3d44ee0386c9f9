"""The interpreted GPU kernels equal dense attention in value and every gradient, and they lower for a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.pallas.kernel import kernel, runs
from posenc_jax.encodings.base import AttentionMask, Encoding
from tests.attention.rows import CONTIGUOUS as CAUSAL
from tests.attention.rows import GROUPED as DIMS
from tests.attention.rows import (
    abstract,
    assert_kernel_equals_dense,
    assert_kernel_in_bfloat16_is_as_close_as_dense,
    assert_members_of_a_stack_equal_each_alone,
    assert_skips_blocks_ahead,
    assert_skips_blocks_before_the_window,
    inputs,
    lowered_gradient,
)

NAMES = [name for name in encodings.names() if runs(abstract(name, dims=DIMS), inputs(), CAUSAL)]

interpreted = functools.partial(kernel, block=16, interpret=True)


compare = functools.partial(assert_kernel_equals_dense, interpreted)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_equals_dense_in_value_and_every_gradient(name):
    compare(name, 50, 50)


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [("alibi", {"learned": True}), ("fox_fixed", {"learned": True}), ("kerple", {"form": "power"})],
)
def test_kernel_equals_dense_where_rates_are_learned(name, hyperparameters):
    compare(name, 50, 50, **hyperparameters)


@pytest.mark.parametrize("name", ["t5", "fire"])
@pytest.mark.parametrize(
    ("length", "queries"),
    [(64, 64), (12, 12), (75, 37), (70, 1), (64, 16)],
    ids=["whole blocks", "less than a block", "fewer queries than keys", "one query", "whole blocks of fewer queries"],
)
def test_kernel_equals_dense_at_any_lengths(name, length, queries):
    compare(name, length, queries)


@pytest.mark.parametrize("window", [1, 7, 16, 17, 40, 1000])
@pytest.mark.parametrize("queries", [75, 37])
def test_kernel_equals_dense_under_a_window(queries, window):
    compare("t5", 75, queries, AttentionMask(window=window, contiguous=True))


@pytest.mark.parametrize("queries", [50, 20])
def test_kernel_equals_dense_with_keys_ahead(queries):
    compare("rope", 50, queries, AttentionMask(causal=False))


@pytest.mark.parametrize("name", ["fire", "grape_a"])
def test_pairwise_biases_follow_positions_that_are_not_contiguous(name):
    positions = jnp.cumsum(jax.random.uniform(jax.random.key(2), (2, 50), minval=0.5, maxval=9), axis=1)
    compare(name, 50, 50, AttentionMask(), positions)


@pytest.mark.parametrize("name", ["none", "t5", "fire", "fox", "grape_a"])
def test_bfloat16_is_as_close_to_float32_as_dense_is(name):
    assert_kernel_in_bfloat16_is_as_close_as_dense(interpreted, name)


def test_blocks_that_no_query_sees_are_not_read():
    assert_skips_blocks_ahead(interpreted, "t5")
    assert_skips_blocks_before_the_window(interpreted, "t5")


def test_members_of_a_stack_equal_each_alone():
    assert_members_of_a_stack_equal_each_alone(interpreted)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # since jax 0.12
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        *((name, 64, jnp.bfloat16) for name in ("none", "alibi", "kerple", "t5", "fire", "fox", "grape_a")),
        ("t5", 20, jnp.float32),
        ("t5", 256, jnp.bfloat16),
    ],
)
def test_kernels_lower_for_a_gpu(name, head_dim, dtype):
    """The forward and backward passes lower to Triton without a GPU, also for stacked runs."""
    text = lowered_gradient(kernel, name, head_dim, dtype, "cuda", ("NVIDIA H100 80GB HBM3", 132, "gpu"))
    kernels = ["output", "gradient_of_queries", "gradient_of_keys"]
    if name in ("kerple", "t5"):
        kernels.append("gradient_of_distances")
    assert all(f"attention_{kernel}" in text for kernel in kernels)


def test_kernels_run_what_changes_logits_by_a_bias_that_they_know():
    class Own(Encoding):
        def weights(self, logits, mask):
            return jax.nn.sigmoid(logits) * mask

    class Unknown(Encoding):
        def bias(self, q, k, logits, q_pos, k_pos, ctx):
            return logits

    assert set(NAMES) >= {
        "rope",
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
    for cls in (Own, Unknown):
        assert not runs(cls(cls.Config(), DIMS, nnx.Rngs(0)), inputs(), CAUSAL)
    none, t5, fire = (encodings.build(name, DIMS, nnx.Rngs(0)) for name in ("none", "t5", "fire"))
    assert all(runs(encoding, inputs(), CAUSAL) for encoding in (none, t5, fire))
    assert runs(fire, inputs(), AttentionMask())
    assert not runs(t5, inputs(), AttentionMask())  # positions may not be contiguous
    assert not runs(t5, inputs(), AttentionMask(causal=False, contiguous=True))
    assert not runs(none, inputs(width=132), CAUSAL)
    assert not runs(none, inputs(value_width=132), CAUSAL)
