"""Attention by blocks of queries equals dense attention in value and every gradient; which encodings need it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.blockwise import blockwise
from posenc_jax.attention.by_query import by_query
from posenc_jax.attention.dense import dense
from posenc_jax.attention.dispatch import DENSE_ROWS_UP_TO, DENSE_UP_TO, algorithm
from posenc_jax.attention.right_to_left import right_to_left
from posenc_jax.encodings.base import CAUSAL, AttentionInputs, AttentionMask, Encoding
from tests.attention.rows import (
    DIMS,
    LONG,
    SIZES,
    assert_bfloat16_as_close_as_dense,
    assert_equals_dense,
    assert_skips_blocks_before_the_window,
    build,
    forms_run_by,
    temporary_bytes,
)

every_form = pytest.mark.parametrize(("name", "hyperparameters"), forms_run_by(by_query))
in_blocks = functools.partial(by_query, block=8)


@every_form
@SIZES
def test_equals_dense_in_value_and_every_gradient(name, hyperparameters, length, queries, kv_heads, attention_mask):
    assert_equals_dense(in_blocks, name, hyperparameters, length, queries, kv_heads, attention_mask)


def test_equals_dense_where_keys_ahead_are_seen():
    assert_equals_dense(in_blocks, "rope", {}, 50, 50, attention_mask=AttentionMask(causal=False))


@pytest.mark.parametrize(("queries", "window"), [(1, None), (40, 1), (40, 2), (40, 18)])
def test_equals_dense_at_the_limits_of_queries_and_window(queries, window):
    assert_equals_dense(in_blocks, "stick_breaking", {}, 40, queries, attention_mask=AttentionMask(window=window))


@pytest.mark.parametrize("queries", [37, 1])
def test_equals_dense_where_gates_that_fade_fast_fill_a_block_up(queries):
    assert_equals_dense(by_query, "wall", {"bias_init": 0.0}, 300, queries)


@pytest.mark.parametrize("length", [100, 300])
def test_equals_dense_at_its_own_block_length(length):
    assert_equals_dense(by_query, "stick_breaking", {}, length, length)


def test_keys_before_the_window_are_not_read():
    assert_skips_blocks_before_the_window(in_blocks, "stick_breaking")


@every_form
def test_bfloat16_is_as_close_to_float32_as_dense_is(name, hyperparameters):
    assert_bfloat16_as_close_as_dense(in_blocks, name, hyperparameters)


def test_early_queries_are_not_compared_with_all_keys():
    encoding = build("stick_breaking", {})
    q, k, v = (jnp.ones((1, 4096, 2, 8)),) * 3
    positions = jnp.arange(4096)[None]

    def attend(q):
        return by_query(encoding, AttentionInputs(q, k, v, positions, positions), CAUSAL)

    program = jax.jit(attend).lower(q).as_text()
    rows = ["x1024xf32", "x2048xf32", "x3072xf32", "x4096xf32"]
    assert all(f"tensor<1x2x128{row}>" in program for row in rows)


def once_each_algorithm():
    """The encodings. All except one for each algorithm are marked slow."""
    seen = {blockwise}  # tested with this algorithm
    for name in encodings.names():
        encoding = build(name, {})
        attend = algorithm(encoding, LONG)
        if attend is not blockwise and not encoding.table_length:
            yield pytest.param(name, marks=pytest.mark.slow if attend in seen else ())
            seen.add(attend)


@pytest.mark.parametrize("name", list(once_each_algorithm()))
def test_memory_of_a_gradient_is_linear_in_the_length_with_every_encoding(name):
    encoding = build(name, {})
    attend = algorithm(encoding, LONG)
    assert temporary_bytes(attend, encoding, 8192) <= 2.2 * temporary_bytes(attend, encoding, 4096)


def test_hooks_that_need_whole_rows_are_given_them_and_short_rows_at_once():
    class Own(Encoding):
        def weights(self, logits, mask):
            return jax.nn.sigmoid(logits) * mask

    class Wide(Encoding):
        blockwise = False

    for cls in (Own, Wide):
        encoding = cls(cls.Config(), DIMS, nnx.Rngs(0))
        assert algorithm(encoding, DENSE_ROWS_UP_TO) is dense
        assert algorithm(encoding, DENSE_ROWS_UP_TO + 1) is by_query


def test_an_encoding_that_can_walk_does_on_all_but_short_sequences():
    class Walks(Encoding):
        blockwise = False

        def scan_step(self, carry, q, k, mask, ctx):
            return carry, self.scores(q, k, ctx)

    class WalksButNotBySoftmax(Walks):
        def weights(self, logits, mask):
            return jax.nn.sigmoid(logits) * mask

    encodings = [cls(cls.Config(), DIMS, nnx.Rngs(0)) for cls in (Walks, WalksButNotBySoftmax)]
    assert [algorithm(encoding, LONG) for encoding in encodings] == [right_to_left, by_query]
    assert algorithm(encodings[0], DENSE_UP_TO) is dense
    assert algorithm(encodings[0], DENSE_UP_TO + 1) is right_to_left
