"""Methods that change positions of pairs of tokens, against the papers' definitions, pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.by_query import by_query
from posenc_jax.attention.dense import attention_logits, dense
from posenc_jax.config import RunConfig
from posenc_jax.data.tokenizers import ByteTokenizer
from posenc_jax.distributed.sharding import make_mesh
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import CAUSAL, AttentionInputs, Dims
from posenc_jax.encodings.mapped import Mapped
from posenc_jax.encodings.position_maps import METHODS
from posenc_jax.evaluation import extrapolation
from posenc_jax.evaluation.generator import Generator
from posenc_jax.evaluation.score_cache import ScoreCache
from posenc_jax.evaluation.scoring import ScoredModel, Scorer
from posenc_jax.schema import ConfigError, plain
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state
from tests.encodings.test_contract import perturbed
from tests.models.test_decoding import assert_decodes
from tests.small import run_config, transformer

B, T, H, K, D = 2, 40, 4, 2, 16
TRAINED = 16  # tokens
SETTINGS = [
    "self_extend:window=4,group=3",
    "self_extend:window=6,group=4",
    "self_extend",
    "rerope:window=5",
    "rerope",
    "lm_infinite:first=3,window=7",
    "lm_infinite",
    "streaming:first=3,window=7",
    "streaming",
    "dual_chunk:chunk=8",
    "dual_chunk",
]


def self_extend(i, j, *, window=4, group=4):  # with groups of 3 the longest distance is 13 + 4 - 1 = 16
    return i - j if i - j < window else (i // group + window - window // group) - j // group


def rerope(i, j, *, window=8):
    return min(i - j, window)


def lm_infinite(i, j, *, first=10, window=16):
    return min(i - j, window) if i - j < window or j < first else None


def streaming(i, j, *, first=4, window=12):
    """The distance in a cache that is filled token by token, and loses the oldest one after the first."""
    cache = []
    for token in range(i + 1):
        cache.append(token)
        if len(cache) > first + window:
            del cache[first]
    return cache.index(i) - cache.index(j) if j in cache else None


def dual_chunk(i, j, *, chunk=12):
    """Table of query positions as in section 3 of the paper, by the number of chunks between query and key."""
    offset, apart = i % chunk, i // chunk - j // chunk
    local = TRAINED - chunk
    successive = [chunk + t if t < local else TRAINED - 1 for t in range(chunk)]
    return [offset, successive[offset], TRAINED - 1][min(apart, 2)] - j % chunk


def distances(text):
    """What a method makes of each distance, from the functions above; NaN: hidden."""
    name, _, rest = text.partition(":")
    numbers = {key: int(number) for key, number in (part.split("=") for part in rest.split(",") if part)}
    found = np.full((T, T), np.nan)
    for i in range(T):
        for j in range(i + 1):
            own = globals()[name](i, j, **numbers)
            found[i, j] = np.nan if own is None else own
    return found


def mapped(text, name="rope", **hyperparameters):
    dims = Dims(H * D, H, K, D, TRAINED)
    base = encodings.build(name, dims, nnx.Rngs(0), **hyperparameters)
    return base, Mapped(base, frequencies.parse(text).at(T, TRAINED), TRAINED)


def inputs(encoding, positions=None, tokens=T):
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (B, tokens, n, D)) for key, n in zip(keys, (H, K, K), strict=True))
    places = jnp.arange(tokens)[None] if positions is None else positions
    ctx = encoding.prepare(jax.random.normal(jax.random.key(2), (B, tokens, H * D)), places)
    rotated = encoding.rotate(q, k, places, places, ctx)
    return (q, k), AttentionInputs(*rotated, v, places, places, ctx)


@pytest.mark.parametrize("text", SETTINGS)
def test_logits_have_the_distances_of_the_paper(text):
    pairing = ("half", "interleaved")[SETTINGS.index(text) % 2]
    base, encoding = mapped(text, pairing=pairing)
    (q, k), own = inputs(encoding)
    logits, _ = attention_logits(encoding, own)
    theta, steps = np.asarray(base.inverse_frequencies[...], np.float64), distances(text)

    def complex_of(x):
        x = np.asarray(x, np.float64)
        real, imaginary = np.split(x, 2, axis=-1) if pairing == "half" else (x[..., ::2], x[..., 1::2])
        return real + 1j * imaginary

    turned, still = complex_of(q), np.repeat(complex_of(k), H // K, axis=2)
    for i in (0, 3, 11, 17, 39):
        for j in range(i + 1):
            if np.isnan(steps[i, j]):
                assert np.all(logits[:, :, i, j] < -1e8)
            else:
                angle = np.exp(1j * steps[i, j] * theta)
                expected = (turned[:, i] * angle * still[:, j].conj()).real.sum(-1) / np.sqrt(D)
                np.testing.assert_allclose(logits[:, :, i, j], expected, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_keep_all_distances_within_the_training_length(name):
    steps = distances(name)
    assert 0 <= np.nanmin(steps) <= np.nanmax(steps) < TRAINED + (name == "lm_infinite")
    seen = np.isfinite(steps[-1])
    assert seen.all() == (name in ("self_extend", "rerope", "dual_chunk"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("rope", text) for text in ("lm_infinite", "dual_chunk", "streaming:window=16")),
        ("decoupled_rope", "dual_chunk"),
    ],
)
def test_within_the_training_length_nothing_changes(name, text):
    base, encoding = mapped(text, name)
    expected = dense(base, inputs(base, tokens=TRAINED)[1])
    np.testing.assert_allclose(dense(encoding, inputs(encoding, tokens=TRAINED)[1]), expected, atol=1e-5)


@pytest.mark.parametrize("text", SETTINGS[::3])
def test_blocks_of_queries_give_the_same(text):
    _, encoding = mapped(text)
    _, own = inputs(encoding, jnp.stack([jnp.arange(T), 2 * jnp.arange(T) + 3]))
    np.testing.assert_allclose(by_query(encoding, own, CAUSAL, 16), dense(encoding, own), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "encoding"),
    [*((name, "rope") for name in METHODS), ("rerope", "decoupled_rope"), ("streaming", "rope_pp")],
)
def test_a_model_decodes_with_a_cache(name, encoding):
    model = perturbed(transformer(encoding, num_layers=1, attention_softcap=2.0, attention_sinks=True))
    scaling = frequencies.parse(f"{name}:chunk=3" if name == "dual_chunk" else f"{name}:window=3")
    model.encoding_0 = Mapped(model.encoding_0, scaling.at(16, 8), 8)
    assert_decodes(model)


def scored_model(**changes):
    config = run_config("rope", **changes)
    state = initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))
    scorer = Scorer(abstract_model(config)[0], make_mesh(1, jax.devices()[:1]), 1024)
    return ScoredModel(config, scorer, state["params"], state["constants"])


def test_a_method_is_one_more_rule_of_the_evaluation(tmp_path):
    rope = {"name": "rope", "base": 100.0}
    layers = {"L": {"encoding": rope, "rope_scalings": False}}
    model = scored_model(model__pattern="LG", layers=layers, evaluation__rope_scalings=("none", "streaming"))
    windows = np.random.default_rng(0).integers(0, 256, (2, 129), np.int32)
    token_bytes = np.ones(256, np.int32)
    rule = extrapolation.rule_at(model.config, "streaming", 128)
    changed = extrapolation.scaled(model, rule)
    assert extrapolation.scaled(model, rule).scorer is changed.scorer is not model.scorer
    merged = nnx.merge(changed.scorer.graphdef, changed.params, changed.constants)
    assert [type(merged.encoding(i)).__name__ for i in range(2)] == ["RoPE", "Mapped"]
    own, plain_losses = (extrapolation.score_scaled(model, x, windows, token_bytes).nats for x in (rule, "none"))
    np.testing.assert_allclose(own[:, :60], plain_losses[:, :60], atol=1e-4)  # streaming has a window of 60 tokens
    assert np.abs(own - plain_losses)[:, 64:].max() > 1e-3
    cached = model._replace(scorer=ScoreCache(model.scorer, tmp_path / "scores", "one", least_seconds=0))
    for x, expected in ((rule, own), ("none", plain_losses), (rule, own)):
        np.testing.assert_array_equal(extrapolation.score_scaled(cached, x, windows, token_bytes).nats, expected)
    assert list(extrapolation.spectra(model.config, model.constants)) == ["none"]


def test_self_extend_is_none_within_the_training_length_and_its_group_follows_the_text():
    config = run_config(evaluation__rope_scalings=("none", *METHODS))
    found = [extrapolation.rule_at(config, "self_extend", length) for length in (64, 65, 256)]
    assert found == ["none", "self_extend:read=65", "self_extend:read=256"]
    for read, group in ((65, 2), (256, 6)):
        longest = METHODS["self_extend"](64, read=read).queries[1](np.float32(read - 1))
        assert longest == (read - 1) // group + 16 - 16 // group < 64


def test_text_is_generated_under_a_method():
    model = scored_model()
    config, scorer, params, constants = model
    text = np.arange(1, 9, dtype=np.int32)
    generator = Generator(config, scorer.graphdef, params, constants, ByteTokenizer(), "rerope:window=2")
    found = [token for step in generator.generate([text], 4) for _, token in step]
    changed = extrapolation.scaled(model, generator.rope_scaling)
    merged = nnx.merge(changed.scorer.graphdef, params, changed.constants)
    for token in found:
        assert token == merged(jnp.asarray(text)[None])[0, -1].argmax()
        text = np.append(text, token)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"evaluation__rope_scalings": ("none", "rerop")}, r"rope_scalings\[1\] = 'rerop': .* Did you mean 'rerope'"),
        ({"evaluation__rope_scalings": ("none", "rerope:window=2.5")}, "window must be an integer number of tokens"),
        ({"evaluation__rope_scalings": ("none", "rerope:group=2")}, "rerope takes, each once: window"),
        (
            {"evaluation__rope_scalings": ("none", "dual_chunk:chunk=65")},
            "chunk must be at most the training length",
        ),
        ({"encoding__scaling": "rerope"}, "config.encoding.scaling = 'rerope': must begin with a rule: none, linear"),
        ({"evaluation__rope_scalings": ("none", "rerope"), "model__causal": False}, "must not have rerope for a model"),
    ],
)
def test_wrong_methods_are_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        RunConfig.from_mapping(plain(run_config("rope", **changes)))
