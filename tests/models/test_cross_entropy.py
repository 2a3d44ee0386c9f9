"""Cross-entropy by parts of the vocabulary equals that of all logits, without storing all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import bert, recurrent, rope_extrap
from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.models import cross_entropy as module
from posenc_jax.models.cross_entropy import cross_entropy, logits
from posenc_jax.training import objectives
from posenc_jax.training.step import build_model
from tests.small import run_config, split


def inputs(vocab_size, dtype, bias):
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (3, 20, 16)).astype(dtype)
    kernel = jax.random.normal(keys[1], (vocab_size + 2, 16))
    constant = 3 * jax.random.normal(keys[2], (vocab_size,)) if bias else None
    targets = jax.random.randint(keys[3], (3, 20), 0, vocab_size).at[0, :2].set(jnp.array([0, vocab_size - 1]))
    return x, kernel, constant, targets, jax.random.uniform(keys[4], (3, 20))


@pytest.mark.parametrize(("bias", "softcap"), [(True, 0.0), (False, 0.0), (True, 5.0), (False, 2.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(("vocab_size", "most"), [(101, 40), (7, 6)])
def test_parts_equal_the_whole_in_value_and_gradients(vocab_size, most, dtype, tolerance, bias, softcap, monkeypatch):
    x, kernel, constant, targets, weights = inputs(vocab_size, dtype, bias)

    def whole(x, kernel, constant, weights):
        plain = logits(x, kernel, constant, vocab_size)
        capped = softcap * jnp.tanh(plain / softcap) if softcap else plain
        return (optax.softmax_cross_entropy_with_integer_labels(capped, targets) * weights).sum()

    def parts(x, kernel, constant, weights):
        return (cross_entropy(x, kernel, constant, vocab_size, targets, softcap) * weights).sum()

    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * targets.size * most)
    monkeypatch.setattr(module, "MIN_PART", 1)
    of = jax.jit(jax.value_and_grad(whole, argnums=(0, 1, 2, 3)))(x, kernel, constant, weights)
    found = jax.jit(jax.value_and_grad(parts, argnums=(0, 1, 2, 3)))(x, kernel, constant, weights)
    assert "scan" in str(jax.make_jaxpr(parts)(x, kernel, constant, weights))
    for a, b in zip(jax.tree.leaves(of), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(value, np.float32) for value in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(a).max(), rtol=0)


@pytest.mark.parametrize("recipe", ["decoder", "untied", "encoder", "elmo", "gru"])
def test_every_model_is_trained_alike_with_its_logits_in_parts(recipe, monkeypatch):
    if recipe in ("decoder", "untied"):
        settings = rope_extrap.get_config("size=smoke")
        settings.model.tied_embeddings = recipe == "decoder"
    elif recipe == "encoder":
        settings = bert.get_config("size=smoke,tokens=bytes")
    else:
        settings = recurrent.get_config(f"size=smoke,cell={recipe}")
    settings.model.num_layers = 1
    config = RunConfig.from_mapping(settings.to_dict())
    graphdef, params, constants = split(build_model(config, jnp.zeros((), jnp.uint32)))
    tokens = jax.random.randint(jax.random.key(0), (2, 25), 0, 256)

    @jax.value_and_grad
    def loss(params):
        model = nnx.merge(graphdef, params, constants)
        return objectives.training_loss(config, model, tokens, None, jax.random.key(1))[0]

    whole = jax.jit(loss)(params)
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 2 * 24 * 100)
    monkeypatch.setattr(module, "MIN_PART", 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole, jax.jit(lambda p: loss(p))(params))


@pytest.mark.parametrize("devices", [1, 8])
def test_logits_of_a_large_vocabulary_never_exist_whole(devices):
    config = run_config(model__num_layers=1, data__tokenizer="bpe", data__vocab_size=50257)
    graphdef, params, constants = split(build_model(config, jnp.zeros((), jnp.uint32)))
    mesh = sharding.make_mesh(16, jax.devices()[:devices])
    tokens = sharding.shard_rows(np.zeros((16, 257), np.int32), mesh)
    params = sharding.replicate(params, mesh)

    def nats(params, tokens):
        return objectives.token_losses(nnx.merge(graphdef, params, constants), tokens)

    all_logits = 4 * 16 * 256 * 50257
    for work in (nats, jax.grad(lambda *arguments: nats(*arguments).sum())):
        held = jax.jit(work).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes
        assert held < 0.5 * all_logits / devices
