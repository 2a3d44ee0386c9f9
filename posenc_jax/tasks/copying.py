"""Copying: a string is shown, and then to be repeated."""

from dataclasses import dataclass

import jax.numpy as jnp

from posenc_jax.schema import Count
from posenc_jax.tasks.base import FIRST, START, STOP, Part, Task, distinct_symbols, symbols, token

COPY = FIRST  # the token between the string and its copy
SYMBOL = FIRST + 1  # the first of the symbols


class Copy(Task):
    """Copy a string: START x COPY x STOP, with a random string x of `size` symbols. The copy and STOP are predicted.

    Symbols may appear several times, so the token before does not tell which one comes next. Coupled positions are
    equal for a symbol and its copy. Source: Jelassi et al. 2024 (26 letters, trained to 50 symbols and tested to
    1,000); for coupled positions, the code of Cho et al. 2024.
    """

    schedules = ("coupled",)

    @dataclass(frozen=True)
    class Config:
        symbols: Count = 26

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size = SYMBOL + config.symbols

    def length(self, size):
        return 2 * size + 2

    def parts(self, key, size, max_size):
        drawn = self.string(key, max_size)
        places = jnp.arange(max_size) + 2
        shown, again = Part(drawn, size, coupled=places), Part(drawn, size, True, places)
        return token(START), shown, token(COPY)._replace(coupled=1), again, token(STOP, scored=True)

    def string(self, key, count):
        """Random symbols, of which the first may be used."""
        return symbols(key, count, SYMBOL, self.config.symbols)

    def is_right(self, tokens):
        middle = tokens.tolist().index(COPY)
        return tokens[1:middle].tolist() == tokens[middle + 1 : -1].tolist() and tokens[-1] == STOP


class RepeatCopy(Copy):
    """Copy a string of few symbols, in which the same short strings come again and again.

    Source: Huang et al. 2024 (2 symbols; trained to 50 of them and tested to 150).
    """

    @dataclass(frozen=True)
    class Config(Copy.Config):
        symbols: Count = 2


class UniqueCopy(Copy):
    """Copy a string in which no symbol appears twice: the token before tells which one comes next.

    Source: Huang et al. 2024.
    """

    @dataclass(frozen=True)
    class Config(Copy.Config):
        symbols: Count = 150

    def __init__(self, config: Config):
        super().__init__(config)
        self.largest_size = config.symbols

    def string(self, key, count):
        return distinct_symbols(key, count, SYMBOL, self.config.symbols)
