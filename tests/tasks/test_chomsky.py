"""The tasks of Deletang et al. 2023: known answers, distributions, and numbers of many digits."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax.tasks import binary, expressions, parity, regular, stacks, strings
from posenc_jax.tasks.base import START, STOP, samples
from tests.tasks.test_contract import COUNT, assert_shares, build, many

STRING = {"=": strings.WRITE} | {digit: strings.SYMBOL + int(digit) for digit in "01234"}
DUPLICATE = {"=": strings.WRITE, "?": strings.MISSING, "_": strings.BLANK, "0": strings.BIT, "1": strings.BIT + 1}
PAIRS = {"=": parity.PARITY, "e": parity.EVEN, "o": parity.ODD, "0": parity.ZERO, "1": parity.ONE}
CIRCLE = {"=": regular.POSITION, "<": regular.LEFT, "-": regular.LEFT + 1, ">": regular.RIGHT}
CIRCLE |= {digit: regular.CIRCLE + int(digit) for digit in "01234"}
STACK = {"=": stacks.STACK, "p": stacks.POP, "z": stacks.PUSH, "i": stacks.PUSH + 1, ".": STOP}
STACK |= {"0": stacks.BIT, "1": stacks.BIT + 1}
NUMBERS = {"=": binary.EQUALS, "#": binary.OPERATOR, "0": binary.BIT, "1": binary.BIT + 1, ".": STOP}
ARITHMETIC = dict(zip("=:+-*()x_01234", range(expressions.EQUALS, expressions.NUMBER + 5), strict=True))

KNOWN = [  # right answers; most are examples of the paper's code
    ("even_pairs", PAIRS, "001110=e 0101001=o"),
    ("cycle_navigation", CIRCLE, ">-<-<<=3 ><-<<=3 >>><=2"),
    ("modular_arithmetic", ARITHMETIC, "1+2*3=2 1-1-1=4 0*1+4*3-2=0 1-2*3*4+1_=3 4_=4"),
    ("modular_arithmetic_brackets", ARITHMETIC, "(2-(1-4))=0 (-3*(1+1))=4 ((-2)--1)=4"),
    ("solve_equation", ARITHMETIC, "(x-(1-4))=0:2 -x=3:2 (2-x)=3:4"),
    ("stack_manipulation", STACK, "0110ipp=110. 110ppp=. 1ppzi=10. 1pp=."),
    ("reverse_string", STRING, "011010=010110"),
    ("duplicate_string", STRING, "101=101101"),
    ("missing_duplicate", DUPLICATE, "011001?0=1 101?01_=1 1?1101_=0"),
    ("odds_first", STRING, "00110101=01110100 110=110 0011=0101"),
    ("bucket_sort", STRING, "10204112=00111224"),
    ("binary_addition", NUMBERS, "001#01101=01011. 1001#000001=100101."),
    ("binary_multiplication", NUMBERS, "001#01101=0001101. 1001#000001=000001001."),
    ("compute_sqrt", NUMBERS, "100101=110 111=10 0001=01"),
]


@pytest.mark.parametrize(("name", "alphabet", "texts"), KNOWN, ids=[name for name, *_ in KNOWN])
def test_checkers_know_the_answers(name, alphabet, texts):
    for text in texts.split():
        tokens = np.array([START, *(alphabet[letter] for letter in text)])
        assert build(name).is_right(tokens), text


@pytest.mark.parametrize("name", ["modular_arithmetic_brackets", "stack_manipulation"])
def test_answers_of_large_samples_are_right(name):
    task, sizes = build(name), range(104 - COUNT, 104)
    batch = jax.jit(lambda key: samples(task, key, jnp.array(sizes), 103))(jax.random.key(0))
    for size, tokens in zip(sizes, np.asarray(batch)[:, 0], strict=True):
        assert task.is_right(tokens[: task.length(size) + 1])


def digits(numbers, count):
    """The binary digits, the least significant one first."""
    return np.array([[number >> place & 1 for place in range(count)] for number in numbers])


def value(row):
    return sum(int(digit) << place for place, digit in enumerate(row))


def test_products_and_roots_of_all_small_and_of_extreme_numbers_are_right():
    pairs = [(left, right) for left in range(16) for right in range(16)]
    pairs += [(2**one - 1, 2**other - 1) for one in range(46, 50) for other in range(46, 50)]
    left, right = (digits(numbers, 100) for numbers in zip(*pairs, strict=True))
    products = np.asarray(jax.jit(jax.vmap(build("binary_multiplication").digits))(left, right))
    assert [value(row) for row in products] == [left * right for left, right in pairs]
    numbers = [*range(256), *(base**2 + more for base in (2**49, 2**49 + 1, 2**50 - 1) for more in (-1, 0, 1))]
    roots = np.asarray(jax.jit(jax.vmap(binary._root))(digits(numbers, 101)))
    assert [value(row) for row in roots] == [math.isqrt(number) for number in numbers]


def forms(length):
    """The probability of each form of an expression with brackets, by the grammar. n is a number, o an operator."""
    if length < 5:
        return {("", "n", "-n", "(n)", "(-n)")[length]: 1.0}
    found = collections.Counter()
    for left in range(1, length - 3):
        for first, share in forms(left).items():
            for second, other in forms(length - 3 - left).items():
                found[f"({first}o{second})"] += share * other / (length - 4)
    return found


def test_expressions_with_brackets_follow_the_grammar():
    rows, expected = many(build("modular_arithmetic_brackets"), 12)[:, 1:13], forms(12)
    letters = {expressions.OPEN: "(", expressions.CLOSE: ")"}
    observed = collections.Counter()
    operators, numbers = collections.Counter(), collections.Counter()
    for row in rows.tolist():
        form = ""
        for symbol in row:
            before = form[-1] in "n)" if form else False
            form += letters.get(symbol) or ("n" if symbol >= expressions.NUMBER else "o" if before else "-")
        observed[form] += 1
        operators.update(symbol for symbol, letter in zip(row, form, strict=True) if letter == "o")
        numbers.update(symbol for symbol, letter in zip(row, form, strict=True) if letter == "n")
    assert set(observed) <= set(expected)
    assert_shares([observed[form] / len(rows) for form in expected], list(expected.values()), len(rows))
    for counts, kinds in ((operators, 3), (numbers, 5)):
        assert len(counts) == kinds
        assert_shares([count / counts.total() for count in counts.values()], np.full(kinds, 1 / kinds), counts.total())


def test_the_unknown_is_the_first_number_from_a_uniform_place_on():
    places = np.argmax(many(build("solve_equation"), 7)[:, 1:6] == expressions.X, axis=1)  # in (n o n)
    assert_shares(np.bincount(places, minlength=5) / len(places), [0, 3 / 5, 0, 2 / 5, 0], len(places))


@pytest.mark.parametrize(
    ("name", "size", "places", "first", "number"),
    [
        ("even_pairs", 9, slice(1, 10), parity.ZERO, 2),
        ("cycle_navigation", 9, slice(1, 10), regular.LEFT, 3),
        ("modular_arithmetic", 9, slice(1, 10, 2), expressions.NUMBER, 5),
        ("modular_arithmetic", 9, slice(2, 10, 2), expressions.PLUS, 3),
        ("bucket_sort", 9, slice(1, 10), strings.SYMBOL, 5),
        ("stack_manipulation", 9, slice(9, 10), stacks.POP, 3),
    ],
)
def test_symbols_are_uniform(name, size, places, first, number):
    drawn = many(build(name), size)[:, places]
    counts = np.bincount(drawn.flatten(), minlength=first + number)
    assert counts.sum() == counts[first : first + number].sum()
    assert_shares(counts[first : first + number] / drawn.size, np.full(number, 1 / number), drawn.size)


def test_lengths_and_places_are_uniform():
    stack = (many(build("stack_manipulation"), 9)[:, 1:10] >= stacks.BIT).sum(1)
    missing = np.argmax(many(build("missing_duplicate"), 9)[:, 1:10] == strings.MISSING, axis=1)
    number = np.argmax(many(build("binary_addition"), 9)[:, 1:10] == binary.OPERATOR, axis=1)
    for found, first, choices in ((stack, 1, 8), (missing, 0, 8), (number, 1, 7)):
        counts = np.bincount(found, minlength=first + choices)
        assert_shares(counts[first:] / len(found), np.full(choices, 1 / choices), len(found))


def test_binary_numbers_are_uniform_and_positive():
    numbers = [value(row) for row in many(build("compute_sqrt"), 4)[:, 4:0:-1] - binary.BIT]
    assert_shares(np.bincount(numbers, minlength=16) / len(numbers), [0, *[1 / 15] * 15], len(numbers))


def test_numbers_of_ones_in_uniform_bits_are_binomial():
    ones = (many(build("parity", uniform_bits=True), 9)[:, 1:10] == parity.ONE).sum(1)
    expected = [math.comb(9, count) / 2**9 for count in range(10)]
    assert_shares(np.bincount(ones, minlength=10) / len(ones), expected, len(ones))
