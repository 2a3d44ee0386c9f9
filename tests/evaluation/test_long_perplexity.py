"""LongPPL against its definition, computed one token at a time."""

import math

import numpy as np
import pytest

from configs import bert
from posenc_jax.config import RunConfig
from posenc_jax.evaluation import long_perplexity
from posenc_jax.evaluation.pooling import Pool
from posenc_jax.evaluation.window_sums import Key, Sums
from posenc_jax.schema import ConfigError
from tests.evaluation.test_extrapolation import LENGTHS, evaluate, reference, setup
from tests.evaluation.test_own_rule import constants_with
from tests.small import run_config

MEASURED = {"evaluation__long_perplexity": True}
RULE = "linear:factor=4"


def long_rows(rows):
    return {key: row for key, row in rows.items() if key[1].startswith("long")}


@pytest.mark.parametrize(("trained", "tail", "short"), [(64, 16, 24), (128, 20, 36)])
def test_it_is_the_perplexity_of_the_tokens_that_the_judge_selects(trained, tail, short, monkeypatch):
    """The thresholds are not those of the paper, because a model with random weights has few such key tokens."""
    monkeypatch.setattr(long_perplexity, "MAX_NATS", 9.0)
    monkeypatch.setattr(long_perplexity, "MIN_GAIN", 0.1)
    changes = {"training__pretrained_length": trained, "evaluation__tail": tail}
    changes |= {"evaluation__rope_scalings": ("none", RULE)}
    arguments = setup(**MEASURED, **changes)
    config, scorer, params, constants, windows = arguments
    rows, scaled = long_rows(evaluate(*arguments)), constants_with(config, RULE)
    assert {length for *_, length in rows} == {length for length in LENGTHS if length > short}
    for length in LENGTHS:
        if length <= short:
            continue

        def last(own, context, length=length):
            read = windows[:, length - context : length + 1]
            return reference(scorer.graphdef, params, own, read)[:, -tail:]

        with_long, with_short = (last(constants, context) for context in (min(length, trained), short))
        selected = [
            (window, i)
            for window in range(5)
            for i in range(tail)
            if with_long[window, i] < 9 and with_short[window, i] - with_long[window, i] > 0.1
        ]
        assert 5 < len(selected) < 4 * tail
        for scaling, own in (("none", constants), (RULE, scaled)):
            nats = last(own, length)
            expected = math.exp(sum(nats[place] for place in selected) / len(selected))
            row = rows[scaling, "long_perplexity", length]
            assert (row.value, row.tokens) == (pytest.approx(expected, rel=1e-4), len(selected))
            assert row.ci_low < row.value < row.ci_high


def test_the_thresholds_are_those_of_the_paper():
    long = np.array([[1.9, 1.9, 2.1, 0.5]])
    short = np.array([[4.0, 3.8, 9.0, 2.6]])
    assert long_perplexity.key_tokens(long, short).tolist() == [[True, False, False, True]]


def test_nothing_else_changes_and_a_length_without_key_tokens_has_no_row(monkeypatch):
    monkeypatch.setattr(long_perplexity, "MAX_NATS", 0.0)
    without, measured = evaluate(*setup()), evaluate(*setup(**MEASURED))
    assert not long_rows(measured)
    assert measured == without


def test_lengths_past_a_table_have_no_value():
    rows = long_rows(evaluate(*setup("learned", **MEASURED)))
    assert [(length, row.value) for (*_, length), row in rows.items()] == [(128, None), (256, None)]


def test_it_is_refused_where_it_cannot_be_measured():
    recipe = bert.get_config("size=smoke,tokens=bytes,positions=rope")
    recipe.evaluation.long_perplexity = True
    with pytest.raises(ConfigError, match="long_perplexity = True: must be False for a model that is not"):
        RunConfig.from_mapping(recipe.to_dict())
    for changes in ({"lengths": (64,), "tail": 56}, {"lengths": (20,), "tail": 16}):
        options = {f"evaluation__{name}": value for name, value in changes.items()}
        with pytest.raises(ConfigError, match=f"is at most {8 + changes['tail']} tokens, an eighth of the training"):
            run_config(**options, **MEASURED)


def test_a_study_pools_the_key_tokens_of_all_seeds():
    documents = [f"document {i}" for i in range(8)]
    draw = np.random.default_rng(0)

    def seed(tokens):
        counts = np.full(8, float(tokens))
        return {Key("none", "long", n): Sums(counts * draw.uniform(0.5, 1.5, 8), counts, counts) for n in (128, 256)}

    seeds = {0: seed(3), 1: seed(5)}
    seeds |= {2: {Key("none", "long", 128): seed(0)[Key("none", "long", 128)], Key("none", "long", 256): None}}
    rows = Pool("study", {"a": seeds, "b": {0: seed(0)}}, documents, 128, resamples=100).results("a")
    assert [(row.encoding, row.metric, row.eval_length, row.tokens) for row in rows] == [
        ("a", "long_perplexity", 128, 64),
        ("a", "long_perplexity", 256, 0),
    ]
    nats = sum(seeds[i][Key("none", "long", 128)].nats.sum() for i in range(2))
    assert rows[0].value == pytest.approx(math.exp(nats / 64))
    assert rows[0].ci_low < rows[0].value < rows[0].ci_high
    assert rows[1].value is None
