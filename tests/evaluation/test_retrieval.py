"""Answers to retrieval tasks: against a loop over tokens, by generation, and the rows that are made of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from posenc_jax.data.tokenizers import ByteTokenizer
from posenc_jax.evaluation import retrieval
from posenc_jax.evaluation.pooling import Pool
from posenc_jax.evaluation.retrieval_tasks import TASKS, Trial
from posenc_jax.evaluation.run_results import effective_lengths, result_rows
from posenc_jax.evaluation.scoring import ScoredModel
from posenc_jax.evaluation.statistics import wilson_interval
from posenc_jax.evaluation.window_sums import Key, Recall, read_sums, write_sums
from posenc_jax.results import Result
from posenc_jax.schema import ConfigError
from tests.evaluation.test_extrapolation import setup
from tests.evaluation.test_retrieval_tasks import TEXT
from tests.small import run_config

ASKED = {
    "evaluation__retrieval_tasks": ("passkey", "multi_query"),
    "evaluation__retrieval_lengths": (512,),
    "evaluation__lengths": (64, 1024),
    "evaluation__retrieval_trials": 3,
    "evaluation__retrieval_depths": 2,
}
WINDOWS = np.resize(np.frombuffer(TEXT, np.uint8), (2, 1025)).astype(np.int32)


def model_of(encoding="rope", devices=1, **changes):
    return ScoredModel(*setup(encoding, devices, **ASKED | changes)[:4])


@nnx.jit
def all_logits(network, tokens):
    return network.unembed(network.states(network.embed(tokens)))


def logits_of(network, tokens):
    return all_logits(network, jnp.asarray(tokens[None], jnp.int32))[0]


@pytest.mark.parametrize(("scaling", "devices"), [("none", 1), ("ntk", 1), ("ntk", 2)])
def test_answers_equal_a_forward_pass_over_each_text(scaling, devices):
    model = model_of("rope", devices, evaluation__rope_scalings=("none", "ntk"))
    measured = retrieval.measure_tasks(model, WINDOWS, ByteTokenizer())
    assert set(measured) == {Key(s, t, 512) for s in ("none", "ntk") for t in ("passkey", "multi_query")}
    rule = retrieval.extrapolation.rule_at(model.config, scaling, 512)
    own = retrieval.extrapolation.scaled(model, rule)
    network = nnx.merge(model.scorer.graphdef, own.params, own.constants)
    for task, _, asked in retrieval.all_trials(model.config, WINDOWS, ByteTokenizer()):
        recall = measured[Key(scaling, task, 512)]
        for trial, nats, right, items in zip(asked, *recall, strict=True):
            logits = logits_of(network, trial.tokens[:-1])
            places = [range(start - 1, stop - 1) for start, stop in trial.items]
            losses = -jax.nn.log_softmax(logits)[np.arange(512), trial.tokens[1:]]
            assert nats == pytest.approx(sum(float(losses[np.array(own)].sum()) for own in places), rel=1e-3)
            best = np.asarray(logits.argmax(-1))
            assert right == sum(all(best[i] == trial.tokens[i + 1] for i in own) for own in places)
            assert items == len(trial.items)


def teach(monkeypatch, right):
    """Replace the model's predictions: those of trial i are right if right[i]."""

    def predictions(scorer, params, constants, tokens, positions, *, last):
        known = np.array(right)[:, None]
        return np.ones((len(tokens), last)), np.where(known, tokens[:, -last:], 0)

    monkeypatch.setattr("posenc_jax.evaluation.scoring.Scorer.predictions", predictions)


def test_rows_have_the_share_of_right_answers_in_total_and_at_each_depth(monkeypatch):
    teach(monkeypatch, [True, True, False])
    model = model_of()
    rows = result_rows(model.config, retrieval.measure_tasks(model, WINDOWS, ByteTokenizer()), ("a", "b"))
    values = {row.metric: (row.value, row.tokens, row.ci_low, row.ci_high) for row in rows}
    assert values["passkey_recall"] == (pytest.approx(2 / 3), 3, *wilson_interval(2 / 3, 3))
    assert values["passkey_recall_at_depth_0.00"][:2] == (0.5, 2)
    assert values["passkey_recall_at_depth_1.00"][:2] == (1.0, 1)
    assert values["multi_query_recall"][:2] == (pytest.approx(2 / 3), 3)
    assert not [name for name in values if name.startswith("multi_query_recall_at")]


def test_a_study_pools_the_trials_of_all_seeds():
    recall = [Recall(np.zeros(4), np.array(right, float), np.ones(4)) for right in ([1, 1, 0, 0], [1, 1, 1, 0])]
    seeds = {seed: {Key("none", "passkey", 64): own} for seed, own in enumerate(recall)}
    pool = Pool("study", {"rope": seeds}, ("a", "b"), train_length=64, resamples=100, num_depths=2)
    values = {row.metric: row for row in pool.results("rope")}
    assert (values["passkey_recall"].value, values["passkey_recall"].tokens) == (5 / 8, 8)
    assert (values["passkey_recall_at_depth_0.00"].value, values["passkey_recall_at_depth_1.00"].value) == (
        3 / 4,
        2 / 4,
    )
    assert values["effective_length"].value == 0


@pytest.mark.parametrize("encoding", ["rope", "path"])
def test_generation_finds_what_teacher_forcing_finds_in_answers_of_one_part(encoding):
    """One answer is what the model would write, the other differs in one token."""
    model = model_of(encoding, model__num_layers=1)
    network = nnx.merge(model.scorer.graphdef, model.params, model.constants)
    tokens = WINDOWS[0, :65].copy()
    for i in range(60, 65):
        tokens[i] = logits_of(network, np.pad(tokens[:i], (0, 64 - i)))[i - 1].argmax()
    wrong = tokens.copy()
    wrong[62] = (wrong[62] + 1) % 256
    asked = [Trial(own, ((60, 65),)) for own in (tokens, wrong)]
    generated = retrieval._generated(model, asked, ByteTokenizer())
    assert retrieval._forced(model, asked).right.tolist() == generated.right.tolist() == [1, 0]
    assert np.isnan(generated.nats).all()


def test_a_generated_part_is_right_if_the_text_contains_it(monkeypatch):
    model = model_of(
        evaluation__retrieval_by="generation",
        evaluation__retrieval_tasks=("multi_value",),
        evaluation__retrieval_trials=1,
    )
    ((_, _, asked),) = retrieval.all_trials(model.config, WINDOWS, ByteTokenizer())
    answers = {trial.items[0][0]: trial.tokens[slice(*trial.items[2])] for trial in asked}

    def written(decoder, prompts, new, keys):
        return ([token] for token in answers[len(prompts[0])].tolist())

    monkeypatch.setattr(retrieval, "continuations", written)
    recall = retrieval.measure_tasks(model, WINDOWS, ByteTokenizer())[Key("none", "multi_value", 512)]
    assert (recall.right.tolist(), recall.items.tolist()) == ([1], [4])


def test_a_length_past_the_table_has_no_answer():
    model = model_of("learned")
    measured = retrieval.measure_tasks(model, WINDOWS, ByteTokenizer())
    assert set(measured.values()) == {None}
    rows = result_rows(model.config, measured, ("a", "b"))
    assert {row.value for row in rows if "recall" in row.metric} == {None}


def test_answers_are_written_and_read(tmp_path, monkeypatch):
    teach(monkeypatch, [True, False, False])
    model = model_of()
    measured = retrieval.measure_tasks(model, WINDOWS, ByteTokenizer())
    write_sums(tmp_path / "windows.npz", measured, ("a", "b"), {})
    found, _, _ = read_sums(tmp_path / "windows.npz", model.config)
    assert isinstance(found[Key("none", "passkey", 512)], Recall)
    for key, recall in measured.items():
        np.testing.assert_allclose(found[key], recall, rtol=1e-6)
    fewer = run_config("rope", **ASKED | {"evaluation__retrieval_trials": 2})
    with pytest.raises(ValueError, match="not of a run with these settings"):
        read_sums(tmp_path / "windows.npz", fewer)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (35, 35), (7, 10)])
def test_the_wilson_interval_equals_that_of_scipy(right, count):
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson_interval(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def result(metric, length, value, low, high):
    return Result("run", "rope", "none", 0, 128, length, metric, value, low, high, 40)


def effective(recalls, gains):
    """The effective length, with its ends, for (low, high) of recall by length, and of the context gain."""
    rows = [result("passkey_recall", length, 0.5, *ends) for length, ends in recalls.items()]
    rows += [result("context_gain_bits_per_byte", length, 0.0, *ends) for length, ends in gains.items()]
    (found,) = effective_lengths(rows)
    assert found.ci_low == found.value
    return found.value, found.ci_high


def test_the_effective_length_needs_recall_and_a_gain_that_is_not_below_zero():
    sure, unsure, lost = (0.95, 1.0), (0.6, 1.0), (0.1, 0.5)
    assert effective({64: sure, 128: sure}, {}) == (128, 128)
    assert effective({64: sure, 256: sure}, {256: (-0.01, 0.02)}) == (256, 256)
    assert effective({64: sure, 256: sure}, {256: (-0.02, -0.01)}) == (64, 64)
    assert effective({64: sure, 256: unsure}, {256: (-0.01, 0.02)}) == (64, 256)
    assert effective({64: sure, 128: lost, 256: sure}, {256: (0.1, 0.2)}) == (64, 64)
    assert effective({64: lost}, {}) == (0, 0)
    assert effective({64: sure, 256: sure}, {256: (None, None)}) == (64, 256)
    assert effective({64: sure, 256: sure}, {}) == (64, 64)


def test_without_the_passkey_there_is_no_effective_length():
    assert effective_lengths([result("context_gain_bits_per_byte", 256, 0.1, 0.0, 0.2)]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieval_tasks": ("passkeys",)}, "retrieval_tasks.*passkeys.*Did you mean 'passkey'"),
        ({"retrieval_tasks": ("passkey", "passkey")}, "retrieval_tasks.*distinct"),
        ({"retrieval_lengths": (512, 128)}, "retrieval_lengths.*increasing"),
        ({"retrieval_lengths": (4096,)}, "retrieval_lengths.*at most 1024"),
        ({"retrieval_by": "guessing"}, "retrieval_by.*guessing"),
    ],
)
def test_wrong_settings_name_their_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        run_config("rope", **ASKED | {f"evaluation__{name}": value for name, value in changes.items()})


def test_an_encoder_has_no_retrieval_tasks():
    with pytest.raises(ConfigError, match=r"retrieval_tasks.*not causal"):
        run_config("rope", **ASKED, model__causal=False)


def test_tasks_are_part_of_what_is_measured():
    assert dataclasses.asdict(run_config("rope", **ASKED).evaluation)["retrieval_tasks"] == ("passkey", "multi_query")
    assert run_config("rope", **ASKED).fingerprint != run_config("rope").fingerprint
    assert set(TASKS) > {"passkey"}
