"""Arithmetic of binary numbers with many digits (Deletang et al. 2023): sums, products and square roots."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from posenc_jax.tasks.addition import carried
from posenc_jax.tasks.base import FIRST, START, STOP, Part, Size, backwards, symbols, token
from posenc_jax.tasks.chomsky import ChomskyTask, stopped

EQUALS, OPERATOR = FIRST, FIRST + 1  # the token before the answer; the one between two numbers
BIT = FIRST + 2  # the token of digit 0


class _Operation(ChomskyTask):
    """START a OPERATOR b EQUALS c STOP, with `size` tokens from a to b."""

    least_size, train_sizes = 3, (3, 40)
    vocab_size = BIT + 2

    def length(self, size):
        return 2 * size + 1

    def parts(self, key, size, max_size):
        for_count, *for_numbers = jax.random.split(key, 3)
        count = jax.random.randint(for_count, (), 1, size - 1)
        counts = count, size - 1 - count
        left, right = (_number(key, count, max_size) for key, count in zip(for_numbers, counts, strict=True))
        digits = self.digits(left, right)
        used = 1 + jnp.max(jnp.where(digits > 0, jnp.arange(max_size), 0))
        question = Part(BIT + left, counts[0]), token(OPERATOR), Part(BIT + right, counts[1])
        return token(START), *question, token(EQUALS), stopped(BIT + digits, used, size)

    def is_right(self, tokens):
        text = "".join({BIT: "0", BIT + 1: "1", STOP: "."}.get(digit, " ") for digit in tokens[1:].tolist())
        left, right, answer = text.split(" ", 2)
        result = self.expected(int(left[::-1], 2), int(right[::-1], 2))
        return answer.startswith(f"{result:b}"[::-1] + ".")

    def digits(self, left: Int[Array, "n"], right: Int[Array, "n"]) -> Int[Array, "n"]:
        """The digits of the result. In all these numbers the least significant digit is the first."""
        raise NotImplementedError

    def expected(self, left: int, right: int) -> int:
        """The result."""
        raise NotImplementedError


class BinaryAddition(_Operation):
    """Add two binary numbers: START a OPERATOR b EQUALS c STOP, with `size` tokens from a to b.

    Numbers begin with their least significant digit. The number of digits of a is uniform between 1 and `size` - 2, and
    b has the others. a and b are uniform among the positive numbers with at most these digits, so they may end with
    zeros. c does not. c and the first STOP are predicted, and more of STOP fill `size` places. Source: Deletang et al.
    2023 and its code. Lengths 1 and 2, which have no OPERATOR there, are left out.
    """

    def digits(self, left, right):
        return carried(left + right, 2)

    def expected(self, left, right):
        return left + right


class BinaryMultiplication(_Operation):
    """Multiply two binary numbers: START a OPERATOR b EQUALS c STOP, with `size` tokens from a to b.

    Apart from c, the product of a and b, it is like `binary_addition`. Source: Deletang et al. 2023 and its code.
    """

    def digits(self, left, right):
        places = jnp.arange(len(left))
        shifts = places[None, :] - places[:, None]
        sums = jnp.where(shifts >= 0, left[:, None] * right[shifts], 0).sum(0)  # long multiplication without carries
        for _ in range(len(left).bit_length()):  # about half of each sum moves to the next place, until none is above 2
            sums = sums % 2 + jnp.append(0, sums[:-1] // 2)
        return carried(sums, 2)

    def expected(self, left, right):
        return left * right


class ComputeSqrt(ChomskyTask):
    """The square root of a binary number, rounded down: START x EQUALS y, with `size` digits in x.

    y has half as many digits, rounded up. Numbers begin with their most significant digit, and may begin with zeros. x
    is uniform among the positive numbers with at most `size` digits. Only y is predicted. Source: Deletang et al. 2023
    and its code.
    """

    vocab_size = BIT + 2

    def length(self, size):
        return size + (size + 1) // 2 + 1

    def parts(self, key, size, max_size):
        number, half = _number(key, size, max_size), (size + 1) // 2
        answer = Part(BIT + backwards(_root(number), half), half, scored=True)
        return token(START), Part(BIT + backwards(number, size), size), token(EQUALS), answer

    def is_right(self, tokens):
        text = "".join({BIT: "0", BIT + 1: "1"}.get(digit, " ") for digit in tokens[1:].tolist())
        number, answer = text.split(" ", 1)
        return answer == f"{math.isqrt(int(number, 2)):b}".zfill((len(number) + 1) // 2)


def _number(key: Array, count: Size, length: int) -> Int[Array, "length"]:
    """The digits of a uniform number from 1 to 2^count - 1. The least significant digit is the first."""
    for_top, for_rest = jax.random.split(key)
    places = jnp.arange(length)
    # Half of these numbers have their highest one in the last place, a quarter in the place before, and so on.
    top = jax.random.categorical(for_top, jnp.where(places < count, places * math.log(2), -jnp.inf))
    return jnp.where(places < top, symbols(for_rest, length, 0, 2), places == top)


def _root(number: Int[Array, "n"]) -> Int[Array, "m"]:
    """The digits of the square root, half as many. The least significant digit is the first.

    It is computed by long division: each step takes two digits of the number, and finds one digit of the root.
    """
    steps = (len(number) + 1) // 2
    pairs = jnp.append(number, jnp.zeros(2 * steps - len(number), number.dtype)).reshape(steps, 2)

    def step(state: tuple[Array, Array], pair: Array) -> tuple[tuple[Array, Array], None]:
        root, rest = state
        rest = jnp.concatenate([pair, rest[:-2]])  # 4 rest + pair
        tried = jnp.concatenate([jnp.array([1, 0]), root])  # 4 root + 1
        # rest - tried, as the sum of rest, the complement of tried, and 1. It has a carry if it is not negative.
        difference = carried(jnp.concatenate([jnp.array([2]), rest + 1 - tried, jnp.array([0])]), 2)
        fits = difference[-1]
        return (jnp.append(fits, root[:-1]), jnp.where(fits == 1, difference[1:-1], rest)), None

    zeros = jnp.zeros(steps, number.dtype), jnp.zeros(steps + 2, number.dtype)
    (root, _), _ = jax.lax.scan(step, zeros, pairs, reverse=True)
    return root
