"""The search for LongRoPE factors, with known optima and with a model."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import longrope_search
from posenc_jax.data.tokenizers import ByteTokenizer
from posenc_jax.distributed import sharding
from posenc_jax.encodings import frequencies
from posenc_jax.evaluation.retrieval_tasks import Source
from posenc_jax.evaluation.scoring import ScoredModel, Scorer
from posenc_jax.schema import ConfigError
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.objectives import token_losses
from posenc_jax.training.step import abstract_model, initial_state
from tests.interop.foreign import llama_folder
from tests.small import run_config

SMALL = {"population": 16, "iterations": 8}


def planted(target, record=None):
    """A loss that is 0 only at `target`. It records its arguments."""

    def loss(factors):
        if record is not None:
            record.append(factors)
        return float(np.square(np.log(factors) - np.log(target)).mean())

    return loss


@pytest.mark.parametrize("target", [(1.0, 1.3, 2.0, 3.9), (1.0, 1.0, 1.1, 1.2, 3.0, 4.5)])
def test_search_finds_a_planted_optimum(target):
    initial = longrope_search.initial_factors(2 * len(target), 1e4, 256, 4.0)
    best, loss = longrope_search.search(planted(target), initial, largest=5.0)
    np.testing.assert_allclose(best, target, rtol=0.05)
    assert loss == planted(target)(best)


@pytest.mark.parametrize("target", [(4.0, 3.0, 2.0, 1.0), (1.0, 9.0, 9.0, 9.0)])
def test_factors_never_decrease_nor_leave_their_range(target):
    seen = []
    longrope_search.search(
        planted(target, seen), longrope_search.initial_factors(8, 1e4, 256, 4.0), largest=5.0, **SMALL
    )
    for factors in seen:
        assert list(factors) == sorted(factors)
        assert factors[0] >= 1
        assert factors[-1] <= 5


def test_no_factor_is_below_its_bound():
    seen, bounds = [], (1.0, 1.0, 2.5, 2.5)
    initial = longrope_search.initial_factors(8, 1e4, 256, 4.0)
    longrope_search.search(planted((1.0, 1.2, 1.4, 1.6), seen), initial, lowest=bounds, largest=5.0, **SMALL)
    for factors in seen:
        assert list(factors) == sorted(factors)
        assert all(factor >= bound for factor, bound in zip(factors, bounds, strict=True))
    best = min(seen, key=planted((1.0, 1.2, 1.4, 1.6)))
    assert best[2] < 2.6  # as near to the optimum as the bound allows


@pytest.mark.parametrize("seed", range(5))
def test_search_is_never_worse_than_its_initial_vectors(seed):
    initial = longrope_search.initial_factors(8, 1e4, 256, 4.0)
    random = np.random.default_rng(seed)
    values = {}

    def loss(factors):  # a random loss, without a gradient to follow
        return values.setdefault(factors, float(random.normal()) - 3 * (factors == tuple(initial[seed % 3])))

    _, best = longrope_search.search(loss, initial, largest=5.0, seed=seed, **SMALL)
    assert best == min(values.values())
    assert best <= min(values[tuple(vector)] for vector in initial)


def test_search_is_determined_by_its_seed():
    def run(seed):
        seen = []
        target = (1.0, 1.3, 2.0, 3.9)
        initial = longrope_search.initial_factors(8, 1e4, 256, 4.0)
        return longrope_search.search(planted(target, seen), initial, largest=5.0, seed=seed, **SMALL), seen

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_search_scores_as_many_vectors_as_asked_each_once():
    seen = []
    longrope_search.search(
        planted((1.0, 1.3, 2.0, 3.9), seen), longrope_search.initial_factors(8, 1e4, 256, 4.0), largest=5.0
    )
    assert len(seen) == len(set(seen))
    assert 0.95 * (64 + 40 * 32) <= len(seen) <= 64 + 40 * 32


def test_no_iteration_leaves_the_best_of_the_first_population():
    seen = []
    loss = planted((1.0, 1.3, 2.0, 3.9), seen)
    best, _ = longrope_search.search(loss, longrope_search.initial_factors(8, 1e4, 256, 4.0), largest=5.0, iterations=0)
    assert len(seen) == 64
    assert best == min(seen, key=planted((1.0, 1.3, 2.0, 3.9)))


@pytest.mark.parametrize(("head_dim", "factor"), [(64, 4.0), (16, 2.5)])
def test_initial_factors_are_those_of_the_rules(head_dim, factor):
    vectors = longrope_search.initial_factors(head_dim, 1e4, 512, factor)
    for vector, name in zip(vectors, ("linear", "ntk", "yarn"), strict=True):
        scaling = frequencies.Scaling("longrope", (("factors", tuple(map(float, vector))),))
        expected, _ = frequencies.RULES[name](head_dim, 1e4, 512, factor=factor)
        np.testing.assert_allclose(scaling.frequencies(head_dim, 1e4, 512)[0], expected, rtol=1e-12)


def test_factors_of_a_model_are_searched_with_one_compilation():
    config = run_config("rope")
    length = 2 * config.training.length
    state = initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, state["params"])
    scorer = Scorer(abstract_model(config)[0], sharding.make_mesh(1, jax.devices()[:1]), batch_tokens=2 * length)
    windows = np.random.default_rng(0).integers(0, 256, (2, length + 1), dtype=np.int32)
    scored = np.arange(length) >= [[0], [length - 5]]  # of the second window only the last five tokens
    loss = longrope_search.model_loss(ScoredModel(config, scorer, params, state["constants"]), windows, scored)

    own = config.encoding.hyperparameters
    initial = longrope_search.initial_factors(config.model.head_dim, own.base, config.training.length, 2.0)
    best, found = longrope_search.search(loss, initial, largest=2.5, population=8, iterations=1)
    assert found <= min(loss(tuple(map(float, vector))) for vector in initial)
    assert scorer.compilations == 1

    # Computed by hand: the model with its rotation replaced.
    model = nnx.merge(scorer.graphdef, params, state["constants"])
    theta, _ = frequencies.none(config.model.head_dim, own.base, config.training.length)
    model.encoding(0).inverse_frequencies[...] = jnp.asarray(theta / np.asarray(best), jnp.float32)
    attention_factor = math.sqrt(1 + math.log(2) / math.log(config.training.length))
    model.encoding(0).attention_factor[...] = jnp.asarray(attention_factor, jnp.float32)
    first, second = np.asarray(token_losses(model, jnp.asarray(windows)))
    assert found == pytest.approx((first.mean() + second[-5:].mean()) / 2, rel=1e-5)


def test_needles_are_hidden_in_the_text_and_only_their_answers_are_scored():
    text = b"The morning was cold, and nobody had slept during the long night before it. " * 20
    source = Source(ByteTokenizer(), np.frombuffer(text, np.uint8).astype(np.int32)[None])
    tokens, scored = longrope_search.needles(source, 300, 4, "--length")
    assert (tokens.shape, scored.shape) == ((4, 301), (4, 300))
    places = []
    for row, answered in zip(tokens, scored, strict=True):
        told = bytes(row[1:][answered].tolist())
        assert re.fullmatch(rb" \d{7}", told)
        content = bytes(row.tolist())
        assert content.endswith(told)
        assert content.count(told) == 2  # once hidden, and once in the answer
        places.append(content.index(told))
    assert places == sorted(places)
    with pytest.raises(ConfigError, match="--length = 60: must be longer"):
        longrope_search.needles(source, 60, 4, "--length")


@pytest.mark.parametrize("needles", [False, True])
def test_factors_of_a_pretrained_model_are_searched_on_another_text(needles, tmp_path, capsys, monkeypatch):
    model, book = llama_folder(tmp_path / "model"), tmp_path / "book"
    book.mkdir()
    for part in range(5):
        (book / f"{part}.txt").write_text(f"Part {part}. It was the best of times, it was the worst of times. " * 16)
    config = longrope_search.settings(str(model), str(book))
    assert (config.data.validation_fraction, config.data.test_fraction, config.pretrained_length) == (0.4, 0.4, 32)
    length = 256 if needles else 64  # a needle takes more than 64 bytes
    options = [f"--length={length}", "--windows=1", "--population=4", "--iterations=1", f"--path={book}"]
    options += ["--needles"] * needles
    one = sharding.make_mesh(1, jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda rows: one)
    monkeypatch.setattr("sys.argv", ["longrope_search", str(model), *options])
    longrope_search.main()
    *_, rule = capsys.readouterr().out.splitlines()
    scaling = frequencies.parse(rule)
    assert str(scaling) == rule
    found = dict(scaling.parameters)
    assert found["factor"] == length / 32
    monkeypatch.setattr("sys.argv", ["longrope_search", str(model), *options, "--critical_pair=5"])
    with pytest.raises(ConfigError, match="--critical_pair = 5: must be at most 4, the number of pairs"):
        longrope_search.main()
    if needles:  # the model has 4 pairs, of which the last 2 do not turn once in 32 tokens
        assert min(found["factors"][2:]) >= length / 32
