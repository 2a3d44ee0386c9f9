"""Every task in the table keeps the promises of posenc_jax/tasks/base.py, at two sets of settings."""

import dataclasses
import functools
import itertools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax import tasks
from posenc_jax.schema import ConfigError, check_schema
from posenc_jax.tasks import addition, copying, flip_flop, indexing, parity, permutations, recall, sorting
from posenc_jax.tasks.base import FIRST, PAD, samples

every_task = pytest.mark.parametrize("name", tasks.names())
COUNT = 64  # samples of a batch


def other(field):
    """Another valid value of a setting."""
    choices = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
    if choices or isinstance(field.default, bool):
        return next(choice for choice in (*choices, not field.default) if choice != field.default)
    return field.default // 2 if isinstance(field.default, int) else (1 + field.default) / 2


def changed(name):
    """The settings of a task with other values, by field."""
    return {field.name: other(field) for field in dataclasses.fields(tasks.load(name).Config)}


def build(name, **settings):
    return tasks.load(name)(tasks.load(name).Config(**settings))


def forms():
    """Every task with its defaults, and with another value of each setting."""
    for name in tasks.names():
        yield pytest.param(name, {}, id=name)
        if changed(name):
            yield pytest.param(name, changed(name), id=f"{name}-changed")


def settings():
    """Every setting of every task."""
    for name in tasks.names():
        for field in dataclasses.fields(tasks.load(name).Config):
            yield pytest.param(name, field, id=f"{name}-{field.name}")


every_form = pytest.mark.parametrize(("name", "settings"), list(forms()))


def largest(task):
    """The largest size in these tests: that of the task, if it is small."""
    limit = task.largest_size or math.inf
    return int(limit) if limit <= 150 else task.least_size + 11


@functools.cache
def sampler(kind, config):
    """A compiled function from a key and sizes to a batch. Each task is compiled once."""
    task = kind(config)
    return jax.jit(lambda key, sizes: samples(task, key, sizes, largest(task)))


def draw(task, sizes, seed=0):
    """Tokens and scored places of one batch."""
    batch = sampler(type(task), task.config)(jax.random.key(seed), jnp.asarray(sizes))
    return np.asarray(batch)[:, 0], np.asarray(batch)[:, 1]


def mixed(task, seed=0):
    """Samples without padding, with their scored places, of all sizes from the least to the largest."""
    sizes = np.linspace(task.least_size, largest(task), COUNT).astype(int)
    ends = [task.length(int(size)) + 1 for size in sizes]
    return [(row[:end], scored[:end]) for row, scored, end in zip(*draw(task, sizes, seed), ends, strict=True)]


def many(task, size, batches=20):
    """The tokens of many samples of one size."""
    rows = [draw(task, np.full(COUNT, size), seed)[0] for seed in range(batches)]
    return np.concatenate(rows)[:, : task.length(size) + 1]


def assert_shares(observed, expected, count):
    """Each share of `count` draws is within five standard deviations of its probability."""
    observed, expected = np.asarray(observed), np.asarray(expected)
    assert np.all(abs(observed - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12), observed


@every_form
def test_the_checker_accepts_samples_and_no_other_answers(name, settings):
    task, rng = build(name, **settings), np.random.default_rng(0)
    for tokens, scored in mixed(task):
        assert task.is_right(tokens)
        assert PAD < tokens.min() <= tokens.max() < task.vocab_size
        places = np.flatnonzero(scored)
        assert places.min() > 0
        for place in rng.choice(places, 2):
            wrong = tokens.copy()
            wrong[place] = (tokens[place] + rng.integers(1, task.vocab_size)) % task.vocab_size
            assert not task.is_right(wrong), (place, tokens, wrong)


@every_form
def test_samples_have_the_length_of_their_size_and_then_padding(name, settings):
    task = build(name, **settings)
    sizes = np.linspace(task.least_size, largest(task), COUNT).astype(int)
    tokens, scored = draw(task, sizes)
    ends = np.array([task.length(int(size)) + 1 for size in sizes])
    assert tokens.shape == scored.shape == (COUNT, task.length(largest(task)) + 1)
    after = np.arange(tokens.shape[1]) >= ends[:, None]
    np.testing.assert_array_equal(tokens == PAD, after)
    assert not scored[after].any()
    assert all(task.length(size) < task.length(size + 1) for size in range(task.least_size, largest(task)))


@every_task
def test_the_key_decides_the_samples(name):
    task = build(name)
    sizes = np.full(COUNT, largest(task))
    np.testing.assert_array_equal(draw(task, sizes)[0], draw(task, sizes)[0])
    assert np.any(draw(task, sizes)[0] != draw(task, sizes, seed=1)[0])
    assert len(np.unique(draw(task, sizes)[0], axis=0)) > COUNT / 2


@pytest.mark.parametrize(("name", "field"), list(settings()))
def test_every_setting_matters(name, field):
    task, other_task = build(name), build(name, **{field.name: other(field)})
    size = largest(other_task)
    assert (
        task.vocab_size != other_task.vocab_size
        or task.length(size) != other_task.length(size)
        or np.any(draw(task, np.full(COUNT, size))[0] != draw(other_task, np.full(COUNT, size))[0])
    )


@every_task
def test_sizes_and_settings_are_possible(name):
    task = build(name)
    check_schema(type(task).Config, name)
    sizes = (*task.train_sizes, *task.test_sizes)
    assert task.least_size <= min(sizes) <= max(sizes) <= (task.largest_size or math.inf)
    assert next(iter(task.cases().items())) == ("answers", task)


@every_task
def test_samples_of_other_cases_are_right(name):
    for case in build(name).cases().values():
        assert all(case.is_right(tokens) for tokens, _ in mixed(case))


def schedules():
    """Every schedule of every task, with each of its settings changed or not."""
    for name in tasks.names():
        for schedule, changes in itertools.product(tasks.load(name).schedules, ({}, changed(name))):
            yield pytest.param(name, changes, schedule, id=f"{name}-{schedule}-{len(changes)}")


@pytest.mark.parametrize(("name", "settings", "schedule"), list(schedules()))
def test_places_change_no_sample_and_fit_the_size(name, settings, schedule):
    task = build(name, **settings)
    sizes = jnp.linspace(task.least_size, largest(task), 8).astype(int)
    drawn = [samples(task, jax.random.key(0), sizes, largest(task), *own) for own in ((), (schedule,))]
    np.testing.assert_array_equal(drawn[0], drawn[1][:, :2])
    for size, places in zip(sizes.tolist(), np.asarray(drawn[1][:, 2]), strict=True):
        end = task.length(size) + 1
        assert not places[end:].any()
        assert set(places[:end].tolist()) - {0} == set(range(1, places.max() + 1))
        assert size <= places.max() <= size + 2


def test_an_unknown_task_gets_an_error_with_its_nearest_name():
    with pytest.raises(ConfigError, match=r"config\.task\.name = 'flipflop'.*Did you mean 'flip_flop'"):
        tasks.load("flipflop", "config.task.name")


def test_strings_to_copy_have_uniform_symbols():
    task = build("repeat_copy")
    assert_shares(np.mean(many(task, 10)[:, 1:11] == copying.SYMBOL), 0.5, 20 * COUNT * 10)
    assert set(many(build("copy"), 10)[:, 1:11].flat) == set(range(copying.SYMBOL, copying.SYMBOL + 26))


def test_strings_of_unique_copy_and_sort_have_every_symbol_at_most_once():
    for name, first in (("unique_copy", copying.SYMBOL), ("sort", sorting.NUMBER)):
        question = np.sort(many(build(name), 100)[:, 1:101], axis=1)
        assert np.all(np.diff(question, axis=1) > 0)
        assert set(question.flat) == set(range(first, first + 150))


def test_the_number_of_ones_is_uniform_and_their_places_are_random():
    bits = many(build("parity"), 9)[:, 1:10] == parity.ONE
    assert_shares(np.bincount(bits.sum(1), minlength=10) / len(bits), np.full(10, 0.1), len(bits))
    ones = bits[bits.sum(1) == 1]
    assert_shares(ones.mean(0), np.full(9, 1 / 9), len(ones))


@pytest.mark.parametrize(("metric", "share"), [("answers", 0.8), ("sparse_answers", 0.98), ("dense_answers", 0.1)])
def test_flip_flop_ignores_the_given_share(metric, share):
    task = build("flip_flop").cases()[metric]
    kinds, bits = np.moveaxis(many(task, 12)[:, 1:].reshape(-1, 12, 2), -1, 0)
    assert np.all(kinds[:, [0, -1]] == [flip_flop.WRITE, flip_flop.READ])
    inner = kinds[:, 1:-1]
    shares = [np.mean(inner == kind) for kind in (flip_flop.IGNORE, flip_flop.WRITE, flip_flop.READ)]
    assert_shares(shares, [share, (1 - share) / 2, (1 - share) / 2], inner.size)
    free = bits[kinds != flip_flop.READ]
    assert_shares(np.mean(free == flip_flop.BIT), 0.5, free.size)


SMALL_MQAR = build("mqar", vocabulary=64, power=0.5)


def test_mqar_asks_once_for_each_key_at_places_by_a_power_law():
    tokens = many(SMALL_MQAR, 2)
    keys, slots = tokens[:, 1:5:2], tokens[:, 5::2]
    asked = slots[:, None] == keys[:, :, None]  # [sample key slot]
    assert np.all(asked.sum(2) == 1)
    weights = np.arange(1, 7) ** -0.5
    first = weights / weights.sum()
    second = [sum(first[i] * first[j] / (1 - first[i]) for i in range(6) if i != j) for j in range(6)]
    assert_shares(asked.mean(0), [first, second], len(tokens))


def test_mqar_has_keys_and_values_of_two_halves():
    tokens = many(SMALL_MQAR, 12)
    pairs = tokens[:, 1:25].reshape(-1, 12, 2)
    for symbols, first, number in ((pairs[..., 0], FIRST, 29), (pairs[..., 1], 32, 32), (tokens[:, 26::2], 32, 32)):
        counts = np.bincount(symbols.flatten(), minlength=64)
        assert counts.sum() == counts[first : first + number].sum()
        assert_shares(counts[first : first + number] / symbols.size, np.full(number, 1 / number), symbols.size)
    assert np.all(np.diff(np.sort(pairs, axis=1), axis=1) > 0)


def test_mqrar_asks_for_each_key_and_half_the_time():
    task = build("mqrar", back=3, vocabulary=64)
    instructions = many(task, 6)[:, 1:].reshape(-1, 6 * recall.TIMES, 3)
    for sample in instructions[:COUNT]:
        keys, counts = np.unique(sample[:, 1], return_counts=True)
        assert counts.tolist() == [recall.TIMES] * 6
        assert all(sample[sample[:, 1] == key][-1, 0] == recall.READ for key in keys)
    reads = np.mean(instructions[:, :, 0] == recall.READ) * recall.TIMES  # per key
    assert_shares((reads - 1) / 4, 0.5, len(instructions) * 6 * 4)
    first = instructions[:, :2, 1]  # the instructions of the keys are mixed
    assert_shares(np.mean(first[:, 0] == first[:, 1]), 7 / 47, len(first))


def test_mqrar_answers_with_the_value_of_some_writes_ago():
    task = build("mqrar", back=3)
    kind = {"w": recall.WRITE, "r": recall.READ}
    texts = {"w a 1 w a 2 w b 9 w a 3 r a 1 w a 4 r a 2": True, "w a 1 w a 2 w a 3 w a 4 r a 1": False}
    for text, right in texts.items():
        tokens = np.array([1, *(kind.get(word, 50 + ord(word)) for word in text.split())])
        assert task.is_right(tokens) == right


def test_indirect_indexing_draws_both_directions_and_all_shifts():
    shifts = []
    for *_, source, _, sign, tens, ones, _, answer in (tokens := many(build("indirect_indexing"), 40)):
        string = tokens[len(shifts), 1:41].tolist()
        shift = (tens - indexing.DIGIT) * 10 + ones - indexing.DIGIT
        shifts.append(shift if sign == indexing.PLUS else -shift)
        assert string.index(answer) - string.index(source) == shifts[-1]
    assert set(shifts) == set(range(-15, 16))
    right, left = (sum(sign * shift > 0 for shift in shifts) for sign in (1, -1))
    assert_shares(right / (right + left), 0.5, right + left)
    sources = [string.index(source) for string, source in zip(tokens[:, 1:41].tolist(), tokens[:, 42], strict=True)]
    assert_shares(np.bincount(sources, minlength=40) / len(tokens), np.full(40, 1 / 40), len(tokens))


@pytest.mark.parametrize(("group", "number"), [("a5", 60), ("s5", 120)])
def test_products_of_permutations_are_those_of_their_effect_on_five_things(group, number):
    def even(p):
        return sum(left > right for left, right in itertools.combinations(p, 2)) % 2 == 0

    elements = [p for p in itertools.permutations(range(5)) if group == "s5" or even(p)]
    assert len(elements) == number
    tokens = many(build("permutation_words", group=group), 7) - permutations.ELEMENT
    for word, answer in zip(tokens[:, 1:8], tokens[:, -1], strict=True):
        things = "abcde"
        for element in word:  # the thing at place i moves to place p[i]
            things = "".join(things[elements[element].index(place)] for place in range(5))
        assert things == "".join("abcde"[elements[answer].index(place)] for place in range(5))
    assert set(tokens[:, 1:8].flat) == set(tokens[:, -1]) == set(range(number))


@pytest.mark.parametrize("reversed_terms", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_digits_of_the_same_significance_have_one_place(reverse, reversed_terms):
    task = build("addition", reversed=reverse, reversed_terms=reversed_terms)
    coupled, abacus = (
        np.asarray(samples(task, jax.random.key(0), jnp.array([3]), 5, schedule))[0, 2, :14]
        for schedule in task.schedules
    )
    term, answer = [4, 3, 2] if reversed_terms else [2, 3, 4], [4, 3, 2, 1] if reverse else [1, 2, 3, 4]
    assert coupled.tolist() == [0, *term, 5, *term, 5, *answer, 0]
    assert abacus.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0]


def test_a_symbol_and_its_copy_have_one_place():
    places = samples(build("copy"), jax.random.key(0), jnp.array([3]), 4, "coupled")[0, 2, :9]
    assert places.tolist() == [0, 2, 3, 4, 1, 2, 3, 4, 0]


def test_addition_is_that_of_integers():
    for tokens in many(build("addition"), 9):
        left, right, answer = (
            "".join(str(digit - addition.DIGIT) for digit in part)
            for part in (tokens[1:10], tokens[11:20], tokens[21:31][::-1])
        )
        assert int(left) + int(right) == int(answer)


def test_carries_pass_through_nines():
    for left, right in itertools.product((0, 1, 95, 555, 999, 4949, 9999), repeat=2):
        digits = [[number // 10**i % 10 for i in range(5)] for number in (left, right)]
        total = addition.carried(jnp.array(digits).sum(0), 10)
        assert sum(int(digit) * 10**i for i, digit in enumerate(total)) == left + right
