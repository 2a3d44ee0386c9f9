"""Sorting: numbers are shown in a random order, and then to be written in increasing order."""

import itertools
from dataclasses import dataclass

import jax.numpy as jnp

from posenc_jax.schema import Count
from posenc_jax.tasks.base import FIRST, START, STOP, Part, Task, distinct_symbols, token

SORT = FIRST  # the token between the numbers and their order
NUMBER = FIRST + 1  # the token of the smallest number


class Sort(Task):
    """Sort different numbers: START x SORT y STOP, with `size` numbers x, and y the same in increasing order.

    Each number is a token. Position does not matter for the question, only for the place in the answer. Source: Huang
    et al. 2024.
    """

    @dataclass(frozen=True)
    class Config:
        numbers: Count = 150

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.largest_size = NUMBER + config.numbers, config.numbers

    def length(self, size):
        return 2 * size + 2

    def parts(self, key, size, max_size):
        drawn = distinct_symbols(key, max_size, NUMBER, self.config.numbers)
        used = jnp.where(jnp.arange(max_size) < size, drawn, self.vocab_size)  # the unused ones come last
        shown, ordered = Part(drawn, size), Part(jnp.sort(used), size, scored=True)
        return token(START), shown, token(SORT), ordered, token(STOP, scored=True)

    def is_right(self, tokens):
        middle = tokens.tolist().index(SORT)
        question, answer = tokens[1:middle].tolist(), tokens[middle + 1 : -1].tolist()
        rising = all(smaller < larger for smaller, larger in itertools.pairwise(answer))
        return rising and set(answer) == set(question) and tokens[-1] == STOP
