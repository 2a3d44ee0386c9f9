"""Strings that are to be written in another way, or completed (Deletang et al. 2023)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from posenc_jax.schema import Count
from posenc_jax.tasks.base import FIRST, START, Part, Size, backwards, symbols, token
from posenc_jax.tasks.chomsky import ChomskyTask

WRITE = FIRST  # the token between the string and the answer
SYMBOL = FIRST + 1  # the first of the symbols
MISSING, BLANK = FIRST + 1, FIRST + 2  # in the place of a bit; fills strings of odd length
BIT = FIRST + 3  # the token of bit 0


class _Rewriting(ChomskyTask):
    """START x WRITE y, with `size` uniform symbols x. Only y is predicted."""

    times = 1  # the length of y, in sizes

    @dataclass(frozen=True)
    class Config:
        symbols: Count = 2

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size = SYMBOL + config.symbols

    def length(self, size):
        return (1 + self.times) * size + 1

    def parts(self, key, size, max_size):
        x = symbols(key, max_size, SYMBOL, self.config.symbols)
        answer = Part(self.rewritten(x, size), self.times * size, scored=True)
        return token(START), Part(x, size), token(WRITE), answer

    def is_right(self, tokens):
        middle = tokens.tolist().index(WRITE)
        return tokens[middle + 1 :].tolist() == self.expected(tokens[1:middle].tolist())

    def rewritten(self, x: Int[Array, "n"], size: Size) -> Int[Array, "m"]:
        """The answer, from the first `size` symbols of x. What comes after the answer has no meaning."""
        raise NotImplementedError

    def expected(self, x: list[int]) -> list[int]:
        """The answer, computed in another way. x has no other symbols."""
        raise NotImplementedError


class ReverseString(_Rewriting):
    """Write a string backwards: START x WRITE y, with `size` uniform symbols x. Only y is predicted.

    Source: Deletang et al. 2023 and its code (2 symbols).
    """

    def rewritten(self, x, size):
        return backwards(x, size)

    def expected(self, x):
        return x[::-1]


class DuplicateString(_Rewriting):
    """Write a string twice: START x WRITE x x, with `size` uniform symbols x. Both copies are predicted.

    Source: Deletang et al. 2023 and its code (2 symbols).
    """

    times = 2

    def rewritten(self, x, size):
        return x[jnp.arange(2 * len(x)) % size]

    def expected(self, x):
        return x * 2


class OddsFirst(_Rewriting):
    """Write the symbols at odd positions first: START x WRITE y, with `size` uniform symbols x. Only y is predicted.

    Positions count from 0: y has the second symbol, the fourth, ..., and then the first, the third, ... Source: the
    code of Deletang et al. 2023 (2 symbols). Its description counts from 1: there y begins with the first symbol.
    """

    def rewritten(self, x, size):
        places, odds = jnp.arange(len(x)), size // 2
        return x[jnp.where(places < odds, 2 * places + 1, 2 * (places - odds))]

    def expected(self, x):
        return x[1::2] + x[::2]


class BucketSort(_Rewriting):
    """Sort a string of few different symbols: START x WRITE y, with `size` uniform symbols x. Only y is predicted.

    Symbols come again, unlike the numbers of `sort`. Source: Deletang et al. 2023 and its code (5 symbols).
    """

    @dataclass(frozen=True)
    class Config(_Rewriting.Config):
        symbols: Count = 5

    def rewritten(self, x, size):
        return jnp.sort(jnp.where(jnp.arange(len(x)) < size, x, self.vocab_size))  # the unused ones come last

    def expected(self, x):
        return [symbol for bucket in range(self.vocab_size) for symbol in x if symbol == bucket]


class MissingDuplicate(ChomskyTask):
    """The missing bit of a string that is written twice: START x x WRITE y, with one bit of x x replaced by MISSING.

    x are `size` / 2 uniform bits, rounded down. BLANK follows x x if the size is odd. The place of MISSING is uniform.
    Only y, the bit that was there, is predicted. Source: Deletang et al. 2023 and its code. There inputs of length 1
    are constant. They are left out here.
    """

    least_size, train_sizes = 2, (2, 40)
    vocab_size = BIT + 2

    def length(self, size):
        return size + 2

    def parts(self, key, size, max_size):
        for_string, for_place = jax.random.split(key)
        places, half = jnp.arange(max_size), size // 2
        twice = symbols(for_string, max_size, BIT, 2)[places % half]
        missing = jax.random.randint(for_place, (), 0, 2 * half)
        shown = jnp.where(places == missing, MISSING, jnp.where(places == 2 * half, BLANK, twice))
        return token(START), Part(shown, size), token(WRITE), Part(twice[missing][None], 1, scored=True)

    def is_right(self, tokens):
        half = (len(tokens) - 3) // 2
        first, second = tokens[1 : 1 + half].tolist(), tokens[1 + half : 1 + 2 * half].tolist()
        (missing,) = (pair for pair in zip(first, second, strict=True) if MISSING in pair)
        return tokens[-1] == sum(missing) - MISSING
