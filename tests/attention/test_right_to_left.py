"""The right-to-left scan over key blocks equals dense attention in value and every gradient."""

import functools

import pytest

from posenc_jax.attention.right_to_left import right_to_left
from posenc_jax.encodings.base import AttentionMask
from tests.attention.rows import (
    SIZES,
    assert_bfloat16_as_close_as_dense,
    assert_equals_dense,
    assert_skips_blocks_ahead,
    assert_skips_blocks_before_the_window,
    forms_run_by,
)

every_form = pytest.mark.parametrize(("name", "hyperparameters"), forms_run_by(right_to_left))
in_blocks = functools.partial(right_to_left, block=16)


@every_form
@SIZES
def test_equals_dense_in_value_and_every_gradient(name, hyperparameters, length, queries, kv_heads, attention_mask):
    assert_equals_dense(in_blocks, name, hyperparameters, length, queries, kv_heads, attention_mask)


@pytest.mark.parametrize(("queries", "window"), [(1, None), (40, 1), (40, 2), (40, 18)])
def test_equals_dense_at_the_limits_of_queries_and_window(queries, window):
    assert_equals_dense(in_blocks, "grape_ap", {}, 40, queries, attention_mask=AttentionMask(window=window))


def test_equals_dense_at_its_own_block_length():
    assert_equals_dense(right_to_left, "path", {"forget_gate": "added"}, 300, 300)


@every_form
def test_bfloat16_is_as_close_to_float32_as_dense_is(name, hyperparameters):
    assert_bfloat16_as_close_as_dense(in_blocks, name, hyperparameters)


def test_blocks_that_no_query_sees_are_not_visited():
    assert_skips_blocks_ahead(in_blocks, "grape_ap")
    assert_skips_blocks_before_the_window(in_blocks, "grape_ap")
