"""Blockwise attention equals dense attention in value and every gradient, and its memory is linear in the length."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention import blockwise as module
from posenc_jax.attention.blockwise import blockwise
from posenc_jax.attention.dense import dense
from posenc_jax.attention.dispatch import algorithm
from posenc_jax.encodings.base import CAUSAL, AttentionInputs, AttentionMask, Dims, DistanceBias, Encoding
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state, make_train_step
from tests.attention.rows import abstract, assert_skips_blocks_ahead, assert_skips_blocks_before_the_window
from tests.small import run_config, split

DIMS = Dims(d_model=16, num_heads=4, num_kv_heads=4, head_dim=8, max_length=64)
BLOCKWISE = [name for name in encodings.names() if algorithm(abstract(name), 10**6) is blockwise]
ALL = [(name, {}) for name in BLOCKWISE]
FORMS = [(name, {}) for name in BLOCKWISE if name == "none" or encodings.load(name).bias is not Encoding.bias]
FORMS += [("alibi", {"learned": True}), ("fox_fixed", {"learned": True}), ("kerple", {"form": "power"})]
OF_DISTANCE = [form for form in FORMS if issubclass(encodings.load(form[0]), DistanceBias)]
KNOWN = AttentionMask(contiguous=True)


def loss(attend, form, arrays, queries, attention_mask=CAUSAL, steps=1):
    """A scalar of the attention of the last queries to all keys, as a function of the differentiated arrays."""
    state, q, k, v, x = arrays
    graphdef = nnx.split(encodings.build(form[0], DIMS, nnx.Rngs(0), **form[1]))[0]
    encoding = nnx.merge(graphdef, state)
    positions = jnp.cumsum(jnp.resize(jnp.asarray(steps), (1, k.shape[1])), axis=1) - 1
    ctx = encoding.prepare(x, positions)
    ctx = jax.tree.map(lambda leaf: leaf[:, -queries:], ctx[0]), ctx[1]
    inputs = AttentionInputs(q[:, -queries:], k, v, positions[:, -queries:], positions, ctx)
    out = attend(encoding, inputs, attention_mask)
    return jnp.sin(out.astype(jnp.float32)).sum(), out


def random_arrays(form, length, dtype=jnp.float32, key_heads=4):
    """The arrays of an encoding (including constants), queries, keys, values, and the input of the layer."""
    encoding = encodings.build(form[0], DIMS, nnx.Rngs(0), **form[1])
    keys = jax.random.split(jax.random.key(1), 4)
    qkv = (
        jax.random.normal(key, (2, length, heads, 8)).astype(dtype)
        for key, heads in zip(keys, (4, key_heads, key_heads), strict=False)
    )
    return nnx.to_pure_dict(nnx.state(encoding)), *qkv, jax.random.normal(keys[3], (2, length, 16))


def assert_equals_dense(form, arrays, queries, attention_mask=CAUSAL, *, block=16, steps=1):
    def value(attend):
        scalar = jax.value_and_grad(lambda own: loss(attend, form, own, queries, attention_mask, steps), has_aux=True)
        return jax.jit(scalar)(arrays)

    (_, expected), expected_gradients = value(dense)
    (_, found), gradients = value(functools.partial(blockwise, block=block))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, expected_gradients)


SHAPES = {
    "loops": (100, 100, 16),
    "written out, fewer queries than keys": (50, 37, 16),
    "fewer queries than keys": (100, 37, 16),
    "one block": (40, 40, 64),
    "one query": (90, 1, 16),
}


def in_shapes(forms, kinds, others):
    """Forms of the listed encodings in every shape, and all other forms in the shapes `others`."""
    shapes = [(form, name) for form in forms for name in (SHAPES if form[0] in kinds else others)]
    cases = [pytest.param(form, *SHAPES[name], id=f"{form}-{name}") for form, name in shapes]
    return pytest.mark.parametrize(("form", "length", "queries", "block"), cases)


@in_shapes(FORMS, kinds=("none", "t5", "fire", "fox"), others=["loops"])
def test_blockwise_equals_dense_in_value_and_every_gradient(form, length, queries, block):
    """This includes the gradients of constants, in case they are differentiated.

    `test_positions_may_be_any` has every form written out, with fewer queries than keys.
    """
    assert_equals_dense(form, random_arrays(form, length), queries, block=block)


@pytest.mark.parametrize("form", [("t5", {}), ("fire", {})], ids=str)
def test_long_inputs_have_larger_blocks_and_the_same_values_and_gradients(form, monkeypatch):
    arrays, blocks = random_arrays(form, 300), []
    cut = module._blocks
    monkeypatch.setattr(module, "_blocks", lambda x, length: blocks.append(length) or cut(x, length))
    for longest in (300, 299):
        monkeypatch.setattr(module, "LONG_FEW_ROWS", longest)
        assert_equals_dense(form, arrays, 300, KNOWN, block=None)
    assert set(blocks) == {128, 256}


@in_shapes(OF_DISTANCE, kinds=("alibi", "t5"), others=list(SHAPES)[:2])
def test_one_bias_for_each_distance_equals_dense_in_value_and_every_gradient(form, length, queries, block):
    assert_equals_dense(form, random_arrays(form, length), queries, KNOWN, block=block)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_positions_may_be_any(form):
    assert_equals_dense(form, random_arrays(form, 50), 37, steps=(1, 3, 2, 7, 1))


@pytest.mark.parametrize("form", [("t5", {}), ("fox", {}), ("grape_a", {}), ("fire", {})], ids=str)
@pytest.mark.parametrize("attention_mask", [CAUSAL, KNOWN], ids=str)
def test_query_heads_may_share_keys(form, attention_mask):
    assert_equals_dense(form, random_arrays(form, 50, key_heads=2), 50, attention_mask)


def masks(*windows):
    """Causal masks with these windows and one without causality, each with contiguous and with other positions."""
    for known in (False, True):
        yield AttentionMask(causal=False, contiguous=known)
        yield from (AttentionMask(window=n, contiguous=known) for n in windows)


@pytest.mark.parametrize(
    ("attention_mask", "queries"),
    [*((mask, 100) for mask in masks(1, 7, 16, 40, 1000)), *((mask, 37) for mask in masks(7, 40))],
    ids=str,
)
def test_blockwise_equals_dense_under_a_window_and_with_keys_ahead(attention_mask, queries):
    assert_equals_dense(("t5", {}), random_arrays(("t5", {}), 100), queries, attention_mask)


def test_stacked_members_have_the_gradients_of_each_alone():
    members = [random_arrays(("t5", {}), 50), jax.tree.map(lambda x: 2 * x, random_arrays(("t5", {}), 50))]
    gradient = jax.grad(lambda arrays: loss(functools.partial(blockwise, block=16), ("t5", {}), arrays, 50, KNOWN)[0])
    together = jax.vmap(gradient)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
    for i, arrays in enumerate(members):
        alone = gradient(arrays)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5), together, alone)


def work_per_pair(function, *arguments, block):
    """Count the operations in loops that act on every pair of a block, by primitive: gathers, and array operations."""
    counts = collections.Counter()

    def walk(jaxpr, in_loop):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            indices = name == "gather" or name.startswith("scatter")
            array = equation.invars[1] if indices else equation.invars[0] if equation.invars else equation.outvars[0]
            shape = getattr(array.aval, "shape", ())[: -1 if indices else None]
            if in_loop and math.prod(shape) >= block * block:
                counts[name] += 1
            for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    walk(part, in_loop or name in ("scan", "while"))

    walk(jax.make_jaxpr(function)(*arguments).jaxpr, False)
    return counts


def blockwise_work(form, attention_mask, constants=False):
    """The work per pair of the gradient for parameters, queries and keys and, if `constants`, for constants."""
    graphdef, params, fixed = split(encodings.build(form[0], DIMS, nnx.Rngs(0), **form[1]))
    _, *others = random_arrays(form, 256)

    def gradient(params, fixed, *others):
        state = nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, params, fixed)))
        return loss(functools.partial(blockwise, block=64), form, (state, *others), 256, attention_mask)[0]

    argnums = (0, 1, 2, 3) if constants else (0, 2, 3)
    return work_per_pair(jax.grad(gradient, argnums), params, fixed, *others, block=64)


@pytest.mark.parametrize("form", OF_DISTANCE, ids=str)
def test_a_bias_of_the_distance_costs_no_more_per_pair_than_its_sum_and_its_gradients(form):
    none, found, at_any = (blockwise_work(*case) for case in ((("none", {}), KNOWN), (form, KNOWN), (form, CAUSAL)))
    learned = jax.tree.leaves(split(encodings.build(form[0], DIMS, nnx.Rngs(0), **form[1]))[1])
    repeated = {"add", "custom_vjp_call"}  # the bias is broadcast to all sequences; its gradient sums over them
    assert set(found - none) == (repeated | {"split", "reduce_sum"} if learned else repeated)
    assert set(at_any - none) - set(found - none)  # without contiguous positions, the bias is computed for each pair


def test_arrays_that_are_not_differentiated_cost_no_gradient():
    fixed, differentiated, none = (
        blockwise_work(*case) for case in ((("alibi", {}), KNOWN), (("alibi", {}), KNOWN, True), (("none", {}), KNOWN))
    )
    assert fixed["reduce_sum"] == none["reduce_sum"]
    assert differentiated["reduce_sum"] > none["reduce_sum"]


@pytest.mark.parametrize("training", ["contiguous", "randomized"])
def test_training_looks_t5s_buckets_up_for_each_pair_only_at_positions_that_are_drawn(training):
    config = run_config("t5", training__length=256, positions__training=training)
    graphdef = abstract_model(config)[0]
    optimizer = optimizers.build(config.optimizer, total_steps=2, warmup_steps=1)
    step = make_train_step(config, graphdef, optimizer, jnp.ones(256, int))
    state = jax.eval_shape(lambda: initial_state(config, optimizer))
    work = work_per_pair(step, state, jnp.zeros((2, 257), int), block=64)
    assert work["dot_general"] > 0
    assert (work["gather"] > 0) == (training == "randomized")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bfloat16_is_as_close_to_float32_as_dense_is(form):
    exact = loss(dense, form, random_arrays(form, 100), 100)[1]
    arrays = random_arrays(form, 100, jnp.bfloat16)
    errors = [
        float(jnp.abs(loss(attend, form, arrays, 100, KNOWN)[1].astype(jnp.float32) - exact).max())
        for attend in (dense, functools.partial(blockwise, block=16))
    ]
    assert errors[1] < 1.5 * errors[0] + 1e-3


@pytest.mark.parametrize("name", ["t5", "fox"])
def test_blocks_that_no_query_sees_are_not_visited(name):
    attend = functools.partial(blockwise, block=16)
    assert_skips_blocks_ahead(attend, name)
    assert_skips_blocks_before_the_window(attend, name)


def each_algorithm_once(form, attention_mask):
    """A test case, marked slow except for one encoding for each way to compute a bias."""
    once = form[0] in ("none", "t5", "fire", "fox") if attention_mask == CAUSAL else form == ("t5", {})
    return pytest.param(form, attention_mask, marks=() if once else pytest.mark.slow)


@pytest.mark.parametrize(
    ("form", "attention_mask"),
    [each_algorithm_once(*case) for case in [(form, CAUSAL) for form in ALL] + [(form, KNOWN) for form in OF_DISTANCE]],
    ids=str,
)
def test_memory_grows_linearly_with_the_length(form, attention_mask):
    def temporary_bytes(length):
        arrays = jax.eval_shape(lambda: random_arrays(form, length))
        gradient = jax.grad(lambda arrays: loss(blockwise, form, arrays, length, attention_mask)[0])
        return jax.jit(gradient).lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 2.2 * temporary_bytes(4096)


def test_an_encoding_that_only_adds_a_bias_runs_blockwise():
    assert algorithm(Encoding(Encoding.Config(), DIMS, nnx.Rngs(0)), 10**6) is blockwise
