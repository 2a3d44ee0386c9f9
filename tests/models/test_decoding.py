"""Cached decoding equals the full forward pass, for every encoding and kind of model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax.attention.temperature import Temperature
from posenc_jax.config import ModelConfig, TemperatureConfig
from posenc_jax.encodings.gated import FoX
from posenc_jax.models import decoding
from posenc_jax.models.decoding import Decoder, continuations
from posenc_jax.models.recurrent import ELMo, Recurrent
from tests.encodings.test_contract import forms, perturbed
from tests.small import forward, split, tokens, transformer

FIRST, CHUNK, STEPS, EMPTY = 9, 4, 5, 7
LENGTH = FIRST + CHUNK + STEPS
TEXT = tokens(length=LENGTH)


@functools.partial(jax.jit, static_argnums=0)
def both_ways(graphdef, params, constants, text, positions=None):
    """Logits of the whole text, and those of its first tokens, a chunk and single tokens with a cache.

    `positions` are those of the tokens and of the empty slots of the cache.
    """
    model = nnx.merge(graphdef, params, constants)
    whole, x = model(text, None if positions is None else positions[..., :LENGTH]), model.embed(text)
    cache = model.new_cache(LENGTH + EMPTY)
    first, chunk = (model.states(part, positions, cache=cache) for part in (x[:, :FIRST], x[:, FIRST : FIRST + CHUNK]))

    def step(cache, x):
        cache = jax.tree.map(lambda leaf: leaf, cache)  # a copy, which `states` changes
        return cache, model.states(x[:, None], positions, cache=cache)[:, 0]

    _, singles = jax.lax.scan(step, cache, x[:, FIRST + CHUNK :].swapaxes(0, 1))
    return whole, model.unembed(jnp.concatenate([first, chunk, singles.swapaxes(0, 1)], axis=1))


def assert_decodes(model, positions=None, atol=1e-4):
    whole, decoded = both_ways(*split(model), TEXT, positions)
    np.testing.assert_allclose(decoded, whole, atol=atol)


@pytest.mark.parametrize(("name", "hyperparameters"), list(forms()))
def test_logits_with_a_cache_equal_those_of_the_whole_text(name, hyperparameters):
    model = perturbed(transformer(name, num_layers=1, num_kv_heads=2, hyperparameters=hyperparameters))
    if model.cacheable:
        assert_decodes(model)
    else:
        with pytest.raises(ValueError, match=f"{type(model.encoding()).__name__} is not cacheable"):
            model.new_cache(LENGTH)


MODELS = {
    "window": ("rope", {"window": 3}),
    "window, where keys are rolled": ("wall", {"window": 3}),
    "window, where keys are updated": ("path", {"window": 3}),
    "layers without the encoding or the window": ("fox", {"window": 3, "pattern": "ENG", "num_layers": 3}),
    "another base in windows": ("rope", {"window": 3, "pattern": "EG", "hyperparameters": {"window_base": 100.0}}),
    "layers that differ": ("rope", {"pattern": "LG", "layers": {"L": {"encoding": {"name": "fox"}, "window": 3}}}),
    "normalized queries and keys": ("xpos", {"qk_norm": True, "qkv_bias": True}),
    "Gemma 2": ("rope", {"attention_softcap": 2.0, "branch_norm": True, "logit_softcap": 3.0, "num_kv_heads": 1}),
    "gpt-oss": ("rope", {"attention_sinks": True, "window": 3, "pattern": "EG", "num_kv_heads": 2}),
    "sinks, where keys are updated": ("path", {"attention_sinks": True}),
    "Canon layers and gates": ("fox", {"canon": True, "attention_gate": True, "window": 3, "num_kv_heads": 2}),
    "two attention heads of each query head": (
        "rope_pp",
        {"attention_sinks": True, "attention_gate": True, "num_kv_heads": 2, "pattern": "EN"},
    ),
    "GPT-NeoX": ("rope", {"parallel_residual": True, "norm": "layer", "activation": "gelu", "use_bias": True}),
    "BERT's order": ("sinusoidal", {"post_norm": True, "norm": "layer"}),
    "BLOOM": ("alibi", {"embedding_norm": True, "scale_embeddings": False, "num_kv_heads": 1}),
    "an output layer of its own": ("t5", {"tied_embeddings": False}),
    "recomputed activations": ("rope", {"remat": True}),
    "another base of DAPE": ("dape", {"hyperparameters": {"base": "fox"}}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_transformer_decodes(kind):
    name, changes = MODELS[kind]
    assert_decodes(perturbed(transformer(name, **{"num_layers": 2} | changes)))


@pytest.mark.parametrize(("form", "window"), [("ssmax", None), ("ssmax", 3), ("llama4", None), ("logn", None)])
def test_temperatures_count_the_cached_tokens(form, window):
    model = perturbed(transformer("rope", num_layers=1, window=window or 0))
    config = TemperatureConfig(form, scale=0.5, floor=4, layers="EN")
    model.block(0).attention.temperature = nnx.data(Temperature(config, num_heads=4, max_length=8))
    assert_decodes(model)


@pytest.mark.parametrize("name", ["rope", "xpos", "fire"])
def test_positions_may_have_gaps_and_differ_between_layers(name):
    spaced = jnp.cumsum(jax.random.randint(jax.random.key(0), (2, 1, LENGTH + EMPTY), 1, 9), axis=-1)
    model = perturbed(transformer(name, num_layers=2))
    assert_decodes(model, spaced[0])
    assert_decodes(model, spaced)
    assert_decodes(model, spaced[0] + 0.5)


def test_bfloat16_stays_as_close_as_its_rounding():
    for name in ("rope", "path"):
        whole, decoded = both_ways(*split(perturbed(transformer(name, num_layers=1, dtype="bfloat16"))), TEXT)
        exact = forward(perturbed(transformer(name, num_layers=1)), TEXT)
        assert jnp.abs(decoded - exact).max() < 2 * jnp.abs(whole - exact).max()


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru", "elmo"])
def test_recurrent_models_carry_their_state(cell):
    config = ModelConfig(architecture=cell, num_layers=2, d_model=16)
    model = (ELMo if cell == "elmo" else Recurrent)(config, vocab_size=64, rngs=nnx.Rngs(0))
    assert_decodes(perturbed(model))


def test_an_encoder_has_no_cache():
    model = transformer("rope", num_layers=1, causal=False)
    with pytest.raises(ValueError, match="the model is not causal"):
        model.new_cache(8)


class Uncached(FoX):
    """FoX that does not say how its sums go on."""

    def prepare(self, x, positions):
        return super().extend(x, positions, None)[0]


@pytest.mark.parametrize("name", ["rope", "path", "uncached"])
def test_a_decoder_compiles_one_program_per_capacity(name, monkeypatch):
    monkeypatch.setattr(decoding, "STEP", 8)
    model = perturbed(transformer("fox" if name == "uncached" else name, num_layers=1))
    if name == "uncached":
        model.encoding().__class__ = Uncached
    assert model.cacheable == (name != "uncached")
    text, arrays = tokens(length=20), split(model)
    decoding._program.cache_clear()
    decoder = Decoder(*arrays, total=20)
    logits = [decoder(text[:, :5])] + [decoder(text[:, i : i + 1]) for i in range(5, 20)]
    np.testing.assert_allclose(np.stack(logits, 1), forward(model, text)[:, 4:], atol=1e-4)
    assert decoder.compilations == 4  # the first tokens, and one token at capacities of 8, 16 and 24
    with pytest.raises(ValueError, match=r"must not exceed total = 20"):
        decoder(text[:, :1])


def test_prompts_of_different_lengths_continue_as_each_alone():
    model = perturbed(transformer("rope", num_layers=1))
    graphdef, params, constants = split(model)
    prompts = [np.asarray(tokens(1, length, seed=length)[0]) for length in (19, 37, 18)]
    keys = jax.random.split(jax.random.key(0), 3)

    def choose(logits, keys):  # depends on the keys of rows as well
        return jax.vmap(jax.random.categorical)(keys, logits)

    def texts(rows):
        longest = max(len(prompts[i]) for i in rows)
        decoder = Decoder(graphdef, params, constants, longest + 6, choose=choose)
        steps = list(continuations(decoder, [prompts[i] for i in rows], 6, keys[jnp.array(rows)]))
        return [[step[row] for step in steps if step[row] is not None] for row in range(len(rows))]

    together = texts([0, 1, 2])
    assert together == [texts([i])[0] for i in range(3)]
    assert [len(text) for text in together] == [6, 6, 6]
