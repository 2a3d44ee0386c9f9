"""Biases that depend on positions, against golden values, transcriptions of their papers, and PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims
from posenc_jax.encodings.bias import alibi_slopes, inverse_softplus, relu_network
from posenc_jax.schema import ConfigError
from tests.small import split

POSITIONS = [0.0, 1.0, 2.5, 4.0, 9.0, 40.0, 41.0, 300.0]  # not evenly spaced, and not all integers
EIGHT = [2.0**-h for h in range(1, 9)]


def build(name, num_heads=4, length=64, **hyperparameters):
    return encodings.build(name, Dims(32, num_heads, num_heads, 8, length), nnx.Rngs(0), **hyperparameters)


def bias(encoding, length, offset=0):
    positions = jnp.arange(length)[None] + offset
    return encoding.bias(None, None, None, positions, positions, (None, None))[0]


def bias_between(encoding, i, j):
    """The biases of all heads for a query at position i and a key at position j."""
    return bias_at(encoding, jnp.array([[i]]), jnp.array([[j]]))[0, :, 0, 0]


def bias_at(encoding, q_pos, k_pos):
    return encoding.bias(None, None, None, q_pos, k_pos, (None, None))


def visible_pairs():
    return [(i, j) for i in POSITIONS for j in POSITIONS if j <= i]


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (8, EIGHT),
        (6, [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]),
        (12, [*EIGHT, 0.70710678, 0.35355339, 0.1767767, 0.08838835]),
        (1, [2.0**-8]),
    ],
)
def test_alibi_slopes_are_the_published_ones(num_heads, expected):
    np.testing.assert_allclose(alibi_slopes(num_heads), expected, rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("num_heads", [4, 12, 40])
def test_alibi_equals_bloom(num_heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    torch = pytest.importorskip("torch")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 20), num_heads, torch.float32).reshape(num_heads, 1, 20).numpy()
    ours = bias(build("alibi", num_heads), 20)
    # Their bias grows with the position of the key. For keys up to the query, the two differ by a constant per row.
    # Softmax ignores it.
    theirs = np.broadcast_to(theirs, ours.shape) - theirs[..., :1]
    np.testing.assert_allclose(np.tril(ours - ours[..., :1]), np.tril(theirs), atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("num_heads", [4, 12])
def test_alibi_equals_x_transformers(num_heads):
    theirs = pytest.importorskip("x_transformers.x_transformers").AlibiPositionalBias(num_heads)(20, 20).numpy()
    np.testing.assert_allclose(np.tril(bias(build("alibi", num_heads), 20)), np.tril(theirs), atol=1e-5)


def test_learned_slopes_are_at_first_alibi_then_multiplied_by_their_factor():
    learned, fixed = build("alibi", learned=True), build("alibi")
    np.testing.assert_array_equal(bias(learned, 10), bias(fixed, 10))
    factors = np.array([0.5, 1, 2, 3])
    learned.log_factors[...] = jnp.asarray(np.log(factors), jnp.float32)
    np.testing.assert_allclose(bias(learned, 10), factors[:, None, None] * bias(fixed, 10), rtol=1e-5)


def test_learned_slopes_stay_positive_whatever_the_update():
    learned = build("alibi", learned=True)
    learned.log_factors[...] = jnp.array([-30.0, -1.0, 0.0, 5.0])
    assert (bias_between(learned, 1, 0) < 0).all()


@pytest.mark.parametrize("exponent", [8.0, 4.0])
def test_alibi_bias_is_minus_slope_times_distance(exponent):
    found = bias(build("alibi", max_exponent=exponent), 10)
    for h in range(4):
        for i in range(10):
            for j in range(i + 1):
                assert found[h, i, j] == pytest.approx(-(2 ** (-exponent * (h + 1) / 4)) * (i - j), rel=1e-6)


def kerple(form, a, p):
    """KERPLE with given rates, one of each per head."""
    encoding = build("kerple", form=form)
    a, p = np.asarray(a, np.float64), np.asarray(p, np.float64)
    encoding.raw_a[...] = jnp.asarray(inverse_softplus(a), jnp.float32)
    encoding.raw_p[...] = jnp.asarray(inverse_softplus(p) if form == "log" else np.log(p / (2 - p)), jnp.float32)
    return encoding


@pytest.mark.parametrize(
    ("a", "p"), [([1.0, 0.5, 0.1, 3.0], [1.0, 0.3, 1.9, 0.01]), ([0.01, 2.0, 1.0, 0.2], [0.7, 1.5, 0.5, 1.0])]
)
def test_kerple_equals_its_equations(a, p):
    for form in ("log", "power"):
        encoding = kerple(form, a, p)
        for i, j in visible_pairs():
            for h, found in enumerate(bias_between(encoding, i, j)):
                expected = -p[h] * math.log(1 + a[h] * (i - j)) if form == "log" else -a[h] * (i - j) ** p[h]
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_kerple_power_of_one_is_alibi_with_any_slopes():
    slopes = [1.0, 0.5, 0.1, 3.0]
    learned = build("alibi", learned=True)
    learned.log_factors[...] = jnp.asarray(np.log(slopes / alibi_slopes(4)), jnp.float32)
    np.testing.assert_allclose(
        np.tril(bias(kerple("power", slopes, np.ones(4)), 20)), np.tril(bias(learned, 20)), rtol=1e-4
    )


def test_kerple_starts_as_alibi_or_as_a_spread_of_logarithms():
    np.testing.assert_allclose(
        np.tril(bias(build("kerple", form="power"), 20)), np.tril(bias(build("alibi"), 20)), rtol=1e-5
    )
    a, p = build("kerple").a_and_p()
    np.testing.assert_allclose(a, 0.5, rtol=1e-6)
    np.testing.assert_allclose(p, [0.25, 0.75, 1.25, 1.75], rtol=1e-6)


@pytest.mark.parametrize("form", ["log", "power"])
def test_kerple_rates_stay_in_their_range_whatever_the_update(form):
    encoding = build("kerple", form=form)
    for step in (-20.0, 20.0):
        encoding.raw_a[...] += step
        encoding.raw_p[...] += step
        a, p = encoding.a_and_p()
        assert (a > 0).all()
        assert (p > 0).all()
        assert form == "log" or (p <= 2).all()


@pytest.mark.parametrize("form", ["log", "power"])
def test_kerple_gradients_are_finite_at_distance_zero_and_for_keys_ahead(form):
    graphdef, params, constants = split(build("kerple", form=form))

    def total(params):
        return bias(nnx.merge(graphdef, params, constants), 5).sum()

    for gradient in jax.tree.leaves(jax.grad(total)(params)):
        assert jnp.isfinite(gradient).all()
        assert (gradient != 0).all()


@pytest.mark.parametrize(
    "hyperparameters", [{}, {"dimension": 8, "base": 100.0, "ratio": 2.0}, {"dimension": 64, "ratio": 4.0}]
)
def test_sandwich_equals_its_equation(hyperparameters):
    values = {"dimension": 128, "base": 1e4, "ratio": 8.0} | hyperparameters
    encoding = build("sandwich", **hyperparameters)
    half = values["dimension"] // 2
    for i, j in visible_pairs():
        cosines = sum(math.cos((i - j) / values["base"] ** (m / half)) for m in range(1, half + 1))
        for h, found in enumerate(bias_between(encoding, i, j), start=1):
            assert found == pytest.approx((cosines - half) / (values["ratio"] * h / 4), abs=2e-3)


def test_sandwich_is_zero_at_distance_zero_and_below_it_elsewhere():
    found = np.tril(bias(build("sandwich"), 100))
    np.testing.assert_allclose(np.diagonal(found, axis1=1, axis2=2), 0, atol=5e-5)
    assert (found[:, *np.tril_indices(100, -1)] < -0.01).all()


def test_sandwich_refuses_an_odd_dimension():
    with pytest.raises(ConfigError, match=r"encoding.dimension = 7: must be even"):
        build("sandwich", dimension=7)


@pytest.mark.torch
@pytest.mark.parametrize(("depth", "log_distance"), [(2, True), (1, False), (3, True)])
def test_dynamic_bias_equals_x_transformers_in_value_and_every_gradient(depth, log_distance):
    x_transformers = pytest.importorskip("x_transformers.x_transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = x_transformers.DynamicPositionBias(8, heads=4, depth=depth, log_distance=log_distance)
    layers = [m for m in theirs.modules() if isinstance(m, torch.nn.Linear)]
    layers[-1].bias.data.zero_()  # softmax ignores it
    graphdef, params, constants = split(build("dynamic_bias", width=8, depth=depth, log_distance=log_distance))
    names = [f"hidden_{i}" for i in range(depth)] + ["out"]
    for name, layer in zip(names, layers, strict=True):
        params[name] = {
            "kernel": jnp.asarray(layer.weight.detach().numpy().T),
            "bias": jnp.asarray(layer.bias.detach().numpy()),
        }
    del params["out"]["bias"]
    weights = np.random.default_rng(0).normal(size=(4, 12, 12)).astype(np.float32)

    def loss(params):
        found = bias(nnx.merge(graphdef, params, constants), 12)
        return (found * weights).sum(), found

    (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    expected = theirs(12, 12)
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)
    for name, layer in zip(names, layers, strict=True):
        np.testing.assert_allclose(gradients[name]["kernel"], layer.weight.grad.numpy().T, rtol=1e-3, atol=1e-3)
        if name != "out":
            np.testing.assert_allclose(gradients[name]["bias"], layer.bias.grad.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("log_distance", [True, False])
def test_dynamic_bias_equals_its_equation_at_any_positions(log_distance):
    encoding = build("dynamic_bias", width=5, log_distance=log_distance)
    hidden_layers = [
        (np.asarray(layer.kernel[...], np.float64), np.asarray(layer.bias[...], np.float64))
        for layer in (encoding.hidden_0, encoding.hidden_1)
    ]
    for i, j in visible_pairs():
        hidden = np.array([math.log(1 + i - j) if log_distance else i - j])
        for kernel, constant in hidden_layers:
            hidden = hidden @ kernel + constant
            hidden = hidden / (1 + np.exp(-hidden))
        expected = hidden @ np.asarray(encoding.out.kernel[...], np.float64)
        np.testing.assert_allclose(bias_between(encoding, i, j), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["alibi", "kerple", "sandwich", "t5", "fire", "dynamic_bias"])
def test_rows_of_a_batch_have_positions_of_their_own(name):
    encoding = build(name)
    positions = jnp.stack([jnp.arange(6), jnp.array([0, 3, 4, 10, 50, 90])])
    both = bias_at(encoding, positions, positions)
    for row in range(2):
        alone = bias_at(encoding, positions[row : row + 1], positions[row : row + 1])
        np.testing.assert_allclose(both[row], alone[0], atol=1e-5)


@pytest.mark.parametrize("name", ["alibi", "kerple"])
def test_both_sides_have_the_same_bias(name):
    found = np.asarray(bias(build(name), 30))
    np.testing.assert_array_equal(found, found.swapaxes(1, 2))
    assert np.ptp(found[0, 10, :10]) > 0.1


@pytest.mark.parametrize(
    ("length", "hyperparameters", "threshold"),
    [(64, {}, 16), (2048, {}, 512), (40, {"width": 8, "c": 1.0, "threshold": 0.5}, 20)],
)
def test_fire_equals_its_equation(length, hyperparameters, threshold):
    encoding = build("fire", length=length, **hyperparameters)
    c = hyperparameters.get("c", 0.1)
    arrays = encoding.hidden.kernel, encoding.hidden.bias, encoding.out.kernel
    w1, b1, w2 = (np.asarray(array[...], np.float64) for array in arrays)
    found = bias(encoding, 40)
    for i in range(40):
        for j in range(i + 1):
            share = math.log(c * (i - j) + 1) / math.log(c * max(i, threshold) + 1)
            expected = np.maximum(share * w1[0] + b1, 0) @ w2
            np.testing.assert_allclose(found[:, i, j], expected, atol=1e-5)


@pytest.mark.parametrize("c", [0.1, 2.0])
def test_fire_is_toeplitz_up_to_its_threshold_only(c):
    encoding = build("fire", length=80, c=c)
    share = encoding.normalized_distance(jnp.arange(60)[None], jnp.arange(60)[None])[0]
    assert share.min() == 0
    assert share.max() == pytest.approx(1)
    np.testing.assert_allclose(share[10, 5], share[20, 15])
    assert abs(share[50, 45] - share[20, 15]) > 0.01


def test_lines_of_a_relu_network_have_its_values_and_gradients():
    keys = jax.random.split(jax.random.key(0), 5)
    arguments = tuple(
        jax.random.normal(key, shape) for key, shape in zip(keys, [(3, 7), (9,), (9,), (9, 4)], strict=False)
    )
    worth = jax.random.normal(keys[4], (4, 3, 7))

    def hidden_layer(x, a, b, out):
        return jnp.moveaxis(jax.nn.relu(x[..., None] * a + b) @ out, -1, 0)

    def loss(network, *arguments):
        return (network(*arguments) * worth).sum()

    np.testing.assert_allclose(relu_network(*arguments), hidden_layer(*arguments), atol=1e-5)
    gradients = (jax.grad(loss, (1, 2, 3, 4))(network, *arguments) for network in (relu_network, hidden_layer))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


def test_fire_starts_from_pytorchs_layers():
    """Without biases in the hidden layer, f would be linear in its input, and half of its units would always be 0."""
    encoding = build("fire", width=1000)
    for weights, bound in ((encoding.hidden.kernel, 1), (encoding.hidden.bias, 1), (encoding.out.kernel, 1000**-0.5)):
        assert jnp.abs(weights[...]).max() == pytest.approx(bound, rel=0.01)
        assert weights[...].std() == pytest.approx(bound / 3**0.5, rel=0.05)
