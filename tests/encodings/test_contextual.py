"""Encodings that depend on queries or logits, against transcriptions of their papers, and PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.dense import dense
from posenc_jax.encodings.base import AttentionInputs, Dims, masked
from posenc_jax.schema import ConfigError
from tests.small import split

B, T, H, D_HEAD, D_MODEL = 2, 9, 4, 6, 24
DIMS = Dims(D_MODEL, H, H, D_HEAD, 16)
EVEN = jnp.arange(T)[None]
UNEVEN = jnp.array([[0, 1, 2, 5, 6, 20, 21, 22, 40], [3, 4, 8, 9, 10, 11, 30, 31, 99]])
MASK = np.tril(np.ones((T, T), bool))


def build(name, dims=DIMS, **hyperparameters):
    return encodings.build(name, dims, nnx.Rngs(0), **hyperparameters)


def queries_keys_values(heads=H):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, H, D_HEAD), (B, T, heads, D_HEAD), (B, T, heads, D_HEAD)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def softmax(z):
    weights = np.exp(z - z.max())
    return weights / weights.sum()


def logits_and_bias(encoding, positions=EVEN, x=None):
    """The masked logits that `bias` receives, and the bias, both for all heads."""
    q, k, _ = queries_keys_values()
    ctx = (None, None) if x is None else encoding.prepare(x, positions)
    logits = masked(encoding.scores(q, k, ctx), jnp.asarray(MASK))
    return logits, encoding.bias(q, k, logits, positions, positions, ctx)


@pytest.mark.parametrize("positions", [EVEN, UNEVEN])
@pytest.mark.parametrize("hyperparameters", [{}, {"max_distance": 3}, {"max_distance": 2, "values": False}])
def test_shaw_equals_its_equations(hyperparameters, positions):
    encoding = build("shaw", **hyperparameters)
    inputs = queries_keys_values()
    found = np.asarray(dense(encoding, AttentionInputs(*inputs, positions, positions)))
    q, k, v = float64(*inputs)
    place = np.broadcast_to(positions, (B, T))
    clip = hyperparameters.get("max_distance", 16)
    (key_vectors,) = float64(encoding.key_table[...])
    value_vectors = np.zeros_like(key_vectors)
    if hyperparameters.get("values", True):
        (value_vectors,) = float64(encoding.value_table[...])
    for b in range(B):
        for h in range(H):
            for i in range(T):
                distance = [int(min(place[b, i] - place[b, j], clip)) for j in range(i + 1)]
                z = [q[b, i, h] @ (k[b, j, h] + key_vectors[n]) / math.sqrt(D_HEAD) for j, n in enumerate(distance)]
                vectors = [v[b, j, h] + value_vectors[n] for j, n in enumerate(distance)]
                np.testing.assert_allclose(found[b, i, h], softmax(np.array(z)) @ np.array(vectors), atol=1e-5)


def test_shaw_with_tables_of_zero_is_no_encoding():
    encoding, inputs = build("shaw"), queries_keys_values()
    encoding.key_table[...] *= 0
    encoding.value_table[...] *= 0
    inputs = AttentionInputs(*inputs, EVEN, EVEN)
    found, expected = (dense(e, inputs) for e in (encoding, build("none")))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_shaw_takes_the_whole_part_of_a_fractional_distance():
    encoding, (q, k, _) = build("shaw"), queries_keys_values()
    whole, fractional = (
        encoding.bias(q, k, None, positions, positions[:, :1], (None, None))
        for positions in (EVEN, EVEN + 0.9 * (EVEN > 0))
    )
    np.testing.assert_array_equal(whole, fractional)


@pytest.mark.parametrize("hook", ["bias", "values"])
def test_shaw_forms_no_vector_per_query_and_key(hook):
    encoding = build("shaw", Dims(64, 1, 1, 256, 64), max_distance=4)
    x, pairs, positions = jnp.ones((1, 64, 1, 256)), jnp.ones((1, 1, 64, 64)), jnp.arange(64)[None]
    arguments = (x, x, pairs) if hook == "bias" else (pairs, x)
    program = jax.make_jaxpr(lambda *args: getattr(encoding, hook)(*args, positions, positions, (None, None)))(
        *arguments
    )
    assert max(v.aval.size for equation in program.eqns for v in equation.outvars) < 64 * 64 * 256 / 8


@pytest.mark.parametrize("positions", [EVEN, UNEVEN])
@pytest.mark.parametrize(("base", "kv_heads", "d_model"), [(1e4, 4, 24), (50.0, 2, 24), (1e4, 1, 10)])
def test_transformer_xl_equals_its_equation(base, kv_heads, d_model, positions):
    encoding = build("transformer_xl", Dims(d_model, H, kv_heads, D_HEAD, 16), base=base)
    q, k, _ = queries_keys_values(kv_heads)
    wide_q, wide_k = encoding.rotate(q, k, positions, positions, (None, None))
    found = encoding.scores(wide_q, jnp.repeat(wide_k, H // kv_heads, axis=2), (None, None))
    q, k, u, v, w = float64(q, k, encoding.content_bias[...], encoding.position_bias[...], encoding.projection[...])
    theta = base ** (-np.arange(0, d_model, 2) / d_model)
    place, found = np.broadcast_to(positions, (B, T)), np.asarray(found)
    sinusoid = {n: np.concatenate([np.sin(n * theta), np.cos(n * theta)]) for n in range(-100, 100)}
    for b in range(B):
        for h in range(H):
            for i in range(T):
                for j in range(T):
                    n = int(place[b, i] - place[b, j])
                    content = (q[b, i, h] + u[h]) @ k[b, j, h // (H // kv_heads)]
                    position = (q[b, i, h] + v[h]) @ (w[h] @ sinusoid[n])
                    assert found[b, h, i, j] == pytest.approx((content + position) / math.sqrt(D_HEAD), abs=2e-5)


def test_transformer_xl_without_projection_and_biases_is_no_encoding():
    encoding, (q, k, _) = build("transformer_xl"), queries_keys_values()
    for array in (encoding.content_bias, encoding.position_bias, encoding.projection):
        array[...] *= 0
    wide_q, wide_k = encoding.rotate(q, k, EVEN, EVEN, (None, None))
    found, expected = encoding.scores(wide_q, wide_k, (None, None)), encoding.scores(q, k, (None, None))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("max_distance", "kv_heads", "positions"), [(0, 4, EVEN), (3, 2, EVEN), (16, 1, UNEVEN), (3, 4, EVEN * 0.75)]
)
def test_deberta_equals_its_equation_in_both_directions(max_distance, kv_heads, positions):
    encoding = build("deberta", Dims(D_MODEL, H, kv_heads, D_HEAD, 5), max_distance=max_distance)
    q, k, _ = queries_keys_values(kv_heads)
    keys = jnp.repeat(k, H // kv_heads, axis=2)
    found = np.asarray(encoding.scores(q, keys, (None, None)))
    found = found + np.asarray(encoding.bias(q, keys, None, positions, positions, (None, None)))
    q, k, table, w_k, w_q, place = float64(
        *(q, keys, encoding.table[...], encoding.of_keys.kernel[...], encoding.of_queries.kernel[...]),
        np.broadcast_to(positions, (B, T)),
    )
    m = max_distance or 5
    assert table.shape == (2 * m, D_MODEL)
    w_k, w_q = (w.reshape(D_MODEL, H, D_HEAD) for w in (w_k, w_q))

    def delta(distance):
        return 0 if distance <= -m else 2 * m - 1 if distance >= m else math.floor(distance) + m

    for b, h, i, j in np.ndindex(B, H, T, T):
        to_position = q[b, i, h] @ (table[delta(place[b, i] - place[b, j])] @ w_k[:, h])
        to_content = k[b, j, h] @ (table[delta(place[b, j] - place[b, i])] @ w_q[:, h])
        expected = (q[b, i, h] @ k[b, j, h] + to_position + to_content) / math.sqrt(3 * D_HEAD)
        assert found[b, h, i, j] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "positions"), [({}, EVEN), ({"fraction": 0.4, "exponent": 0.7}, UNEVEN[:1] + 0.5)]
)
def test_tapa_equals_its_equation_in_both_directions(settings, positions):
    encoding = build("tapa", **settings)
    q, k, _ = queries_keys_values()
    found = np.asarray(encoding.scores(q, k, encoding.prepare(jnp.zeros((B, T, D_MODEL)), positions)))
    (q, k, place), a = float64(q, k, positions[0]), int(settings.get("fraction", 0.5) * D_HEAD)
    for b, h, i, j in np.ndindex(B, H, T, T):
        phase = q[b, i, h, a:] @ k[b, j, h, a:] / math.sqrt(D_HEAD - a)
        turns = abs(place[i] - place[j]) ** settings.get("exponent", 0.1) * phase
        expected = q[b, i, h, :a] @ k[b, j, h, :a] / math.sqrt(a) * math.cos(2 * math.pi * turns)
        assert found[b, h, i, j] == pytest.approx(expected, abs=1e-4)


def cope(positions):
    encoding = build("cope", positions=positions)
    encoding.table[...] = jax.random.normal(jax.random.key(5), encoding.table.shape)
    return encoding


@pytest.mark.parametrize("count", [64, 3])
def test_cope_equals_its_equations(count):
    encoding = cope(count)
    _, found = logits_and_bias(encoding)
    q, k, table = float64(*queries_keys_values()[:2], encoding.table[...])
    for b in range(B):
        for h in range(H):
            for i in range(T):
                gates = 1 / (1 + np.exp(-k[b, : i + 1, h] @ q[b, i, h] / math.sqrt(D_HEAD)))
                for j in range(i + 1):
                    position = min(gates[j:].sum(), count - 1)
                    low, high = math.floor(position), math.ceil(position)
                    vector = table[low] + (position - low) * (table[high] - table[low])
                    assert found[b, h, i, j] == pytest.approx(q[b, i, h] @ vector, abs=2e-5)


@pytest.mark.parametrize("count", [64, 4])
def test_cope_with_all_gates_open_is_a_table_of_clipped_distances(count):
    encoding, (q, k, _) = cope(count), queries_keys_values()
    logits = masked(jnp.full((B, H, T, T), 100.0), jnp.asarray(MASK))
    found = encoding.bias(q, k, logits, EVEN, EVEN, (None, None))
    for i in range(T):
        for j in range(i + 1):
            expected = q[:, i] @ encoding.table[min(i - j + 1, count - 1)]
            np.testing.assert_allclose(found[:, :, i, j], expected, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("count", [64, 3])
def test_cope_equals_x_transformers_in_value_and_every_gradient(count):
    x_transformers = pytest.importorskip("x_transformers.x_transformers")
    torch = pytest.importorskip("torch")
    encoding, (q, k, _) = cope(count), queries_keys_values()
    logits, _ = logits_and_bias(encoding)
    graphdef, params, constants = split(encoding)
    weights = np.where(MASK, np.random.default_rng(0).normal(size=(B, H, T, T)), 0).astype(np.float32)

    def loss(params, q, logits):
        found = nnx.merge(graphdef, params, constants).bias(q, k, logits, EVEN, EVEN, (None, None))
        return (found * weights).sum(), found

    (_, found), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, q, logits)
    theirs = x_transformers.CoPE(D_HEAD, H, count)
    theirs.pos_emb.data = torch.tensor(np.asarray(params["table"]))
    their_q, their_logits = (torch.tensor(np.asarray(x), requires_grad=True) for x in (q.swapaxes(1, 2), logits))
    expected = theirs(their_q, their_logits)
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(gradients[0]["table"], theirs.pos_emb.grad.numpy(), atol=1e-4)
    np.testing.assert_allclose(gradients[1].swapaxes(1, 2), their_q.grad.numpy(), atol=1e-4)
    np.testing.assert_allclose(gradients[2], their_logits.grad.numpy(), atol=1e-4)


def test_a_new_cope_is_no_encoding():
    assert not logits_and_bias(build("cope"))[1].any()


@pytest.mark.parametrize(("base", "width"), [("alibi", 32), ("kerple", 5), ("fox", 8)])
def test_dape_equals_its_equation(base, width):
    encoding = build("dape", base=base, width=width)
    encoding.hidden.bias[...] += 0.3
    x = jax.random.normal(jax.random.key(9), (B, T, D_MODEL))
    s, found = logits_and_bias(encoding, x=x)
    _, b = logits_and_bias(encoding.base, x=x)
    s, b = float64(s, jnp.broadcast_to(b, s.shape))
    layers = float64(encoding.hidden.kernel[...], encoding.hidden.bias[...], encoding.out.kernel[...])
    for i in range(T):
        for j in range(i + 1):
            hidden = np.concatenate([s[:, :, i, j], b[:, :, i, j]], axis=1) @ layers[0] + layers[1]
            hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
            expected = b[:, :, i, j] + hidden @ layers[2]
            np.testing.assert_allclose(found[:, :, i, j], expected, atol=2e-5)


@pytest.mark.parametrize("name", ["dape", "dape_v2"])
@pytest.mark.parametrize("base", ["alibi", "bam", "kerple", "sandwich", "t5", "fire", "dynamic_bias", "fox"])
def test_dape_with_a_network_of_zero_is_its_base(name, base):
    encoding = build(name, base=base)
    encoding.out.kernel[...] *= 0
    x = jax.random.normal(jax.random.key(9), (B, T, D_MODEL))
    _, found = logits_and_bias(encoding, UNEVEN, x)
    _, expected = logits_and_bias(encoding.base, UNEVEN, x)
    np.testing.assert_allclose(found, jnp.broadcast_to(expected, found.shape), atol=1e-6)


@pytest.mark.parametrize("name", ["dape", "dape_v2"])
@pytest.mark.parametrize("base", ["rope", "none", "cope", "shaw", "transformer_xl", "dape", "hard_alibi", "alibbi"])
def test_dape_refuses_a_base_that_is_more_or_less_than_a_bias(name, base):
    with pytest.raises(ConfigError, match=rf"encoding.base = '{base}': must be one of: alibi, bam, kerple, .*fox"):
        build(name, base=base)


@pytest.mark.parametrize(("kernel", "width"), [(3, 32), (5, 4), (1, 4)])
def test_dape_v2_equals_its_equation(kernel, width):
    encoding = build("dape_v2", kernel=kernel, width=width)
    encoding.hidden.bias[...] += 0.3
    s, found = logits_and_bias(encoding)
    _, b = logits_and_bias(encoding.base)
    inputs = np.concatenate(float64(jnp.where(MASK, s, 0), jnp.where(MASK, jnp.broadcast_to(b, s.shape), 0)), axis=1)
    w1, b1, w2 = float64(encoding.hidden.kernel[...], encoding.hidden.bias[...], encoding.out.kernel[...])
    half = kernel // 2
    for i in range(T):
        seen = range(i + 1)
        hidden = np.zeros((B, T, width))
        for j in seen:
            near = [m for m in range(j - half, j + half + 1) if m in seen]
            hidden[:, j] = sum(inputs[:, :, i, m] @ w1[m - j + half] for m in near) + b1
        hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
        for j in seen:
            near = [m for m in range(j - half, j + half + 1) if m in seen]
            expected = b[:, :, i, j] + sum(hidden[:, m] @ w2[m - j + half] for m in near)
            np.testing.assert_allclose(found[:, :, i, j], expected, atol=2e-5)


@pytest.mark.torch
def test_dape_v2_equals_the_authors_network_where_the_text_ends():
    """Their network masks only its input, so a longer text would change all rows except the last one."""
    torch = pytest.importorskip("torch")
    encoding = build("dape_v2")
    encoding.hidden.bias[...] += 0.3
    s, found = logits_and_bias(encoding)
    _, b = logits_and_bias(encoding.base)
    inputs = torch.tensor(np.concatenate([s, jnp.broadcast_to(b, s.shape)], axis=1))
    convolutions = [torch.nn.Conv2d(2 * H, 32, (1, 3), padding=(0, 1)), torch.nn.Conv2d(32, H, (1, 3), padding=(0, 1))]
    for theirs, ours in zip(convolutions, (encoding.hidden, encoding.out), strict=True):
        theirs.weight.data = torch.tensor(np.asarray(ours.kernel[...])).permute(2, 1, 0)[:, :, None]
    convolutions[0].bias.data = torch.tensor(np.asarray(encoding.hidden.bias[...]))
    convolutions[1].bias.data.zero_()  # softmax ignores it
    network = torch.nn.Sequential(convolutions[0], torch.nn.LeakyReLU(), convolutions[1])
    with torch.no_grad():
        for length in range(1, T + 1):
            theirs = network(torch.tril(inputs[:, :, :length, :length])).numpy()
            expected = b[:, :, length - 1, :length] + theirs[:, :, -1]
            np.testing.assert_allclose(found[:, :, length - 1, :length], expected, atol=2e-5)
        whole = network(torch.tril(inputs)).numpy()
    assert np.abs(found - b - whole)[:, :, MASK][..., :-T].max() > 0.01


def test_dape_v2_of_kernel_one_is_dape():
    v2, v1 = build("dape_v2", kernel=1), build("dape")
    for theirs, ours in ((v2.hidden, v1.hidden), (v2.out, v1.out)):
        theirs.kernel[...] = ours.kernel[...][None]
    found, expected = (np.where(MASK, logits_and_bias(encoding)[1], 0) for encoding in (v2, v1))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_dape_v2_refuses_an_even_kernel():
    with pytest.raises(ConfigError, match=r"encoding.kernel = 4: must be odd"):
        build("dape_v2", kernel=4)
