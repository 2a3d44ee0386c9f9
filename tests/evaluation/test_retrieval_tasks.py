"""Retrieval tasks: every task of the table makes texts of the exact length whose answers follow from them."""

import re

import numpy as np
import pytest

from posenc_jax.data.tokenizers import ByteTokenizer, train
from posenc_jax.evaluation import retrieval_tasks
from posenc_jax.evaluation.retrieval_tasks import TASKS, Source, Trial, depths, right_items, trials
from posenc_jax.results import METRICS, RETRIEVAL
from posenc_jax.schema import ConfigError
from tests.small import run_config

WORDS = [
    f"{a}{b}{c}" for a in ("bra", "tel", "nos", "ur") for b in ("vin", "kal", "dom") for c in ("er", "ing", "a", "os")
]
TEXT = (" ".join(WORDS) + ".\n").encode() * 60
LENGTH = 2048


def subwords():
    return train(run_config(data__tokenizer="bpe", data__vocab_size=400).data, [TEXT])


@pytest.fixture(scope="module", params=[ByteTokenizer, subwords])
def source(request):
    tokenizer = request.param()
    ids = np.resize(tokenizer.encode(TEXT), 3 * (LENGTH + 1)).astype(np.int32)
    return Source(tokenizer, ids.reshape(3, LENGTH + 1))


def text_of(source, trial):
    """The text before the answer, and the parts of the answer."""
    decode = source._tokenizer.decode
    parts = [decode(trial.tokens[slice(*item)]).decode().strip() for item in trial.items]
    return decode(trial.tokens[: trial.items[0][0]]).decode(), parts


def solved(task, text):
    """The parts of the answer, found by reading the text."""
    listed = re.findall(r"[a-z]+", text.rpartition("\n")[0])
    counts = {word: listed.count(word) for word in set(listed)}
    asked = text.rpartition(" of ")[2].split()[0]
    if task == "passkey":
        return re.findall(r"The pass key is (\d+)\.", text)
    if task == "multi_value":
        return re.findall(rf"One of the special numbers of {asked} is (\d+)\.", text)
    if task == "variable_tracking":
        values = {}
        for name, value, other in re.findall(r"variable (\w+) is set to (?:(\d+)|the value of (\w+))\.", text):
            values[name] = value or values[other]
        return [name for name, value in values.items() if value == re.findall(r"value is (\d+) are", text)[0]]
    if task in ("common_words", "frequent_words"):
        number = int(re.findall(r"The (\d+) words", text)[0])
        return sorted(counts, key=counts.__getitem__, reverse=True)[:number]
    facts = dict(re.findall(r"The special number of (\w+) is (\d+)\.", text))
    return [facts[asked]] if task != "multi_query" else list(facts.values())


def test_every_task_has_a_title_and_a_metric():
    assert list(TASKS) == list(RETRIEVAL)
    assert {f"{task}_recall" for task in TASKS} <= set(METRICS)


@pytest.mark.parametrize("task", TASKS)
def test_a_text_has_the_exact_length_ends_with_its_answer_and_determines_it(task, source):
    for trial in trials(task, source, LENGTH, 4, 2):
        assert trial.tokens.shape == (LENGTH + 1,)
        assert trial.items[-1][1] == LENGTH + 1
        text, parts = text_of(source, trial)
        found = solved(task, text)
        assert sorted(found) == sorted(parts) if trial.any_order or task == "multi_query" else found == parts
        assert len(set(parts)) == len(parts)


@pytest.mark.parametrize("task", TASKS)
def test_trials_are_the_same_in_every_run_and_differ_from_each_other(task, source):
    first, again = (trials(task, source, LENGTH, 3, 2) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    assert len({trial.tokens.tobytes() for trial in first}) == 3


@pytest.mark.parametrize("task", [task for task, own in TASKS.items() if own.has_depth])
def test_the_depth_places_the_statement(task, source):
    number = len(depths(task, 3))
    assert depths(task, number) == [0, 0.5, 1]
    for depth, trial in zip(depths(task, number), trials(task, source, LENGTH, number, number), strict=True):
        text, (answer,) = text_of(source, trial)
        assert text.index(answer) / len(text) == pytest.approx(depth, abs=0.15)


@pytest.mark.parametrize("task", TASKS)
def test_a_text_that_is_too_short_for_a_task_is_an_error(task, source):
    with pytest.raises(ConfigError, match=f"config.evaluation.lengths = 16: must be longer .*'{task}'"):
        trials(task, source, 16, 1, 1)


def test_a_corpus_with_too_few_words_is_an_error():
    few = Source(ByteTokenizer(), np.resize(np.frombuffer(b"only four words here. ", np.uint8).astype(int), (1, 308)))
    with pytest.raises(ConfigError, match=r"retrieval_tasks = 'variable_tracking': needs 5 different words.* has 4"):
        trials("variable_tracking", few, 250, 1, 1)


def test_an_answer_is_right_if_all_its_tokens_are_the_most_likely_ones():
    trial = Trial(np.array([9, 9, 1, 2, 0, 1, 3]), ((2, 4), (5, 7)))
    assert right_items(trial, trial.tokens) == 2
    assert right_items(trial, np.array([0, 0, 1, 2, 7, 1, 3])) == 2  # what is between is given
    assert right_items(trial, np.array([9, 9, 1, 3, 0, 1, 3])) == 1
    assert right_items(trial, np.array([9, 9, 1, 3, 0, 1, 2])) == 0


def test_in_any_order_a_part_may_be_replaced_by_one_that_was_not_yet_given():
    trial = Trial(np.array([9, 9, 1, 2, 0, 1, 3]), ((2, 4), (5, 7)), any_order=True)
    assert right_items(trial, np.array([9, 9, 1, 3, 0, 1, 3])) == 2  # after 1, the other part goes on with 3
    assert right_items(trial, np.array([9, 9, 1, 3, 0, 1, 2])) == 1  # the first part was given
    assert right_items(trial, np.array([9, 9, 3, 2, 0, 1, 3])) == 1  # no part begins with 3
    assert retrieval_tasks.right_items(trial, np.full(7, 8)) == 0
