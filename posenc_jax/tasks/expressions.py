"""Arithmetic expressions of small numbers, with and without brackets, and equations (Deletang et al. 2023)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from posenc_jax.schema import Count
from posenc_jax.tasks.base import FIRST, START, Part, Size, symbols, token
from posenc_jax.tasks.chomsky import ChomskyTask

EQUALS, SOLVE = FIRST, FIRST + 1  # SOLVE asks for the value of X
PLUS, MINUS, TIMES = FIRST + 2, FIRST + 3, FIRST + 4
OPEN, CLOSE, X, BLANK = FIRST + 5, FIRST + 6, FIRST + 7, FIRST + 8  # brackets; the unknown; after expressions
NUMBER = FIRST + 9  # the token of number 0


class _Arithmetic(ChomskyTask):
    """START x EQUALS y, where y is the value of the expression x."""

    @dataclass(frozen=True)
    class Config:
        modulus: Count = 5

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size = NUMBER + config.modulus

    def length(self, size):
        return size + 2

    def answer(self, value: Int[Array, ""]) -> Part:
        """A number as the answer."""
        return Part(NUMBER + value[None], 1, scored=True)

    def is_right(self, tokens):
        *expression, _, answer = tokens[1:].tolist()
        return answer == NUMBER + _evaluated(expression) % self.config.modulus


class ModularArithmetic(_Arithmetic):
    """The value of an expression modulo 5: START x EQUALS y, with `size` tokens x. Only y is predicted.

    x has numbers from 0 to 4, with PLUS, MINUS or TIMES between them. All are uniform. TIMES goes before PLUS and
    MINUS, as usual. Another `modulus` than 5 is possible. If the size is even, the expression has one token less, and
    BLANK follows it. Source: Deletang et al. 2023 and its code. There the expression has one token less too, but
    nothing follows it.
    """

    def parts(self, key, size, max_size):
        for_numbers, for_operators = jax.random.split(key)
        most, number = (max_size + 1) // 2, (size + 1) // 2
        numbers = symbols(for_numbers, most, 0, self.config.modulus)
        operators = symbols(for_operators, most, PLUS, 3).at[0].set(PLUS)  # before each number. The first is not shown
        tokens = jnp.stack([NUMBER + numbers, jnp.roll(operators, -1)], axis=1).reshape(-1)
        shown = Part(jnp.where(jnp.arange(2 * most) == 2 * number - 1, BLANK, tokens), size)
        return token(START), shown, token(EQUALS), self.answer(self._value(numbers, operators, number))

    def _value(self, numbers: Int[Array, "n"], operators: Int[Array, "n"], count: Size) -> Int[Array, ""]:
        """The value of the first `count` numbers, each with the operator before it."""
        begins = operators != TIMES  # a product, of one number or more
        signed = jnp.where(operators == MINUS, -numbers, numbers)

        def joined(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
            product = jnp.where(right[0], right[1], left[1] * right[1] % self.config.modulus)
            return left[0] | right[0], product

        _, products = jax.lax.associative_scan(joined, (begins, signed))
        places = jnp.arange(len(numbers))
        ends = (places == count - 1) | ((places < count) & jnp.roll(begins, -1))
        return jnp.where(ends, products, 0).sum() % self.config.modulus


class ModularArithmeticBrackets(_Arithmetic):
    """The value of an expression with brackets modulo 5: START x EQUALS y, with `size` tokens x. Only y is predicted.

    x is OPEN l o r CLOSE, where o is an operator, and l and r are expressions. The length of l is uniform among the
    possible ones. An expression of less than 5 tokens is a number n, MINUS n, OPEN n CLOSE or OPEN MINUS n CLOSE.
    Numbers from 0 to 4 are uniform, and so are operators: PLUS, MINUS, and TIMES with `multiplication`. Another
    `modulus` than 5 is possible. Source: Deletang et al. 2023 and its code, with the same distribution.
    """

    @dataclass(frozen=True)
    class Config(_Arithmetic.Config):
        multiplication: bool = True

    def parts(self, key, size, max_size):
        operators = 3 if self.config.multiplication else 2
        tokens, value = _expression(key, size, max_size, self.config.modulus, operators)
        return token(START), Part(tokens, size), token(EQUALS), self.answer(value)


class SolveEquation(_Arithmetic):
    """The unknown number in an equation modulo 5: START e EQUALS v SOLVE y, with `size` tokens from e to v.

    e is an expression as in `modular_arithmetic_brackets`, with PLUS and MINUS only, and v is its value. X replaces one
    number of e: from a uniform place in e on, the first one, or the first one of e if there is none. Only y, that
    number, is predicted. No other number solves the equation. Source: Deletang et al. 2023 and its code. There inputs
    of 1 and 2 tokens are constant. They are left out here.
    """

    least_size, train_sizes = 3, (3, 40)

    def parts(self, key, size, max_size):
        for_expression, for_place = jax.random.split(key)
        length, places = size - 2, jnp.arange(max_size - 2)
        tokens, value = _expression(for_expression, length, max_size - 2, self.config.modulus, 2)
        distance = (places - jax.random.randint(for_place, (), 0, length)) % length
        unknown = jnp.argmin(jnp.where((tokens >= NUMBER) & (places < length), distance, max_size))
        shown = Part(jnp.where(places == unknown, X, tokens), length), token(EQUALS), Part(NUMBER + value[None], 1)
        return token(START), *shown, token(SOLVE), self.answer(tokens[unknown] - NUMBER)

    def is_right(self, tokens):
        *expression, _, value, _, answer = tokens[1:].tolist()
        solved = [answer if symbol == X else symbol for symbol in expression]
        return answer >= NUMBER and (_evaluated(solved) - value + NUMBER) % self.config.modulus == 0


def _expression(
    key: Array, size: Size, max_size: int, modulus: int, operators: int
) -> tuple[Int[Array, "max_size"], Int[Array, ""]]:
    """A random expression with brackets, of which the first `size` tokens have a meaning, and its value.

    Tokens are drawn from left to right. A stack has an entry for each open bracket: the length of its right operand, or
    0 if this has begun or there is none; its operator; the value of its left operand.
    """
    for_numbers, for_operators, for_lengths = jax.random.split(key, 3)
    numbers = symbols(for_numbers, max_size, 0, modulus)
    drawn = symbols(for_operators, max_size, PLUS, operators)
    random = symbols(for_lengths, max_size, 0, 2**30)  # the remainder of each is a uniform length
    plus_nothing = jnp.array([0, PLUS, 0])

    def step(state: tuple[Array, ...], own: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        # `length` is that of the expression that begins here, or 0 where one of this `value` has just ended.
        length, sign, value, depth, stack = state
        number, operator, random = own
        later, pending, left = stack[depth - 1]
        opens, negates, ends = length > 2, length == 2, length == 1
        operates, closes = (length == 0) & (later > 0), (length == 0) & (later == 0)
        kinds = [opens, negates, ends, operates]

        longest = jnp.maximum(length - 4, 1)  # of the left operand
        left_length = jnp.where(length > 4, 1 + random % longest, length - 2)
        right_length = jnp.where(length > 4, length - 3 - left_length, 0)
        pushed = stack.at[depth].set(plus_nothing.at[0].set(right_length))
        begun = stack.at[depth - 1].set(jnp.stack([jnp.zeros_like(operator), operator, value]))
        stack = jnp.where(opens, pushed, jnp.where(operates, begun, stack))

        result = jnp.select([pending == PLUS, pending == MINUS], [left + value, left - value], left * value)
        value = jnp.select([ends, closes], [sign * number, result], value) % modulus
        sign = jnp.where(negates, -1, jnp.where(ends, 1, sign))
        symbol = jnp.select(kinds, [OPEN, MINUS, NUMBER + number, operator], CLOSE)
        length = jnp.select(kinds, [left_length, 1, 0, later], 0)
        return (length, sign, value, depth + opens - closes, stack), (symbol, value)

    stack = jnp.zeros((max_size // 4 + 1, 3), jnp.int32)
    state = jnp.asarray(size, jnp.int32), jnp.array(1), jnp.array(0), jnp.array(0), stack
    _, (tokens, values) = jax.lax.scan(step, state, (numbers, drawn, random))
    return tokens, values[size - 1]


def _evaluated(tokens: list[int]) -> int:
    """The value of an expression. BLANK may follow it."""
    return _sum(tokens, 0)[0]


def _sum(tokens: list[int], start: int) -> tuple[int, int]:
    """The value of the sum of products that begins at `start`, and the place after it."""
    total, (product, place) = 0, _factor(tokens, start)
    while place < len(tokens) and tokens[place] in (PLUS, MINUS, TIMES):
        factor, after = _factor(tokens, place + 1)
        if tokens[place] == TIMES:
            product *= factor
        else:
            total, product = total + product, factor if tokens[place] == PLUS else -factor
        place = after
    return total + product, place


def _factor(tokens: list[int], start: int) -> tuple[int, int]:
    """The value of the number or bracket that begins at `start`, with or without MINUS, and the place after it."""
    if tokens[start] == MINUS:
        value, after = _factor(tokens, start + 1)
        return -value, after
    if tokens[start] == OPEN:
        value, after = _sum(tokens, start + 1)
        return value, after + 1
    return tokens[start] - NUMBER, start + 1
