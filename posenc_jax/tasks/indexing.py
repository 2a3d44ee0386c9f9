"""Indirect indexing: the symbol that stands a number of places beside a given symbol."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from posenc_jax.schema import Count
from posenc_jax.tasks.base import FIRST, START, Part, Task, distinct_symbols, token

COMMA, PLUS, MINUS = FIRST, FIRST + 1, FIRST + 2
DIGIT = FIRST + 3  # the token of digit 0
SYMBOL = DIGIT + 10  # the first of the symbols


class IndirectIndexing(Task):
    """The symbol at a shift from a source symbol: START x COMMA s COMMA shift COMMA y. Only y is predicted.

    x are `size` different symbols, and s is one of them. The shift is PLUS (to the right) or MINUS (to the left) and
    digits, such as MINUS 0 3 for three places to the left. It is uniform among the shifts up to `shift` that do not
    leave the string; 0 is one of them. Source: PoPE (Gopalakrishnan et al. 2025), section 4 and appendix A.1 (20 to 40
    of 52 letters, shifts up to 15). There shifts have no leading zeros, so the length depends on the shift. The test
    size of 50 is ours.
    """

    train_sizes, test_sizes = (20, 40), (20, 30, 40, 50)

    @dataclass(frozen=True)
    class Config:
        symbols: Count = 52
        shift: Count = 15

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.largest_size = SYMBOL + config.symbols, config.symbols
        self.digits = len(str(config.shift))

    def length(self, size):
        return size + 6 + self.digits

    def parts(self, key, size, max_size):
        for_string, for_source, for_shift = jax.random.split(key, 3)
        drawn = distinct_symbols(for_string, max_size, SYMBOL, self.config.symbols)
        source = jax.random.randint(for_source, (), 0, size)
        left = jnp.minimum(source, self.config.shift)
        right = jnp.minimum(size - 1 - source, self.config.shift)
        shift = jax.random.randint(for_shift, (), -left, right + 1)
        sign = jnp.where(shift < 0, MINUS, PLUS)
        digits = DIGIT + jnp.abs(shift) // 10 ** jnp.arange(self.digits)[::-1] % 10
        question = jnp.stack([jnp.array(COMMA), drawn[source], jnp.array(COMMA), sign, *digits, jnp.array(COMMA)])
        answer = Part(drawn[source + shift][None], 1, scored=True)
        return token(START), Part(drawn, size), Part(question, len(question)), answer

    def is_right(self, tokens):
        string, (source,), (sign, *digits), (answer,) = _split(tokens[1:].tolist())
        shift = int("".join(str(digit - DIGIT) for digit in digits))
        return answer == string[string.index(source) + (shift if sign == PLUS else -shift)]


def _split(tokens: list[int]) -> list[list[int]]:
    """The parts between the first three commas."""
    parts: list[list[int]] = [[]]
    for value in tokens:
        if value == COMMA and len(parts) < 4:
            parts.append([])
        else:
            parts[-1].append(value)
    return parts
