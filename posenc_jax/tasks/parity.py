"""Parity: whether the number of ones in a bit string is even or odd."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from posenc_jax.tasks.base import FIRST, START, Part, Task, ranks, token

PARITY, EVEN, ODD = FIRST, FIRST + 1, FIRST + 2  # the token between the string and its parity; the two answers
ZERO, ONE = FIRST + 3, FIRST + 4


class Parity(Task):
    """The parity of a bit string: START x PARITY y, with `size` bits x, and y = EVEN or ODD. Only y is predicted.

    The number of ones is uniform between 0 and `size`, and their places are random. So long strings with few ones are
    as frequent as others. Source: Huang et al. 2024, whose model also predicts STOP. With `uniform_bits`, bits are
    independent and uniform, as in the parity check of Deletang et al. 2023. Then long strings have about as many ones
    as zeros.
    """

    vocab_size = ONE + 1

    @dataclass(frozen=True)
    class Config:
        uniform_bits: bool = False

    def length(self, size):
        return size + 2

    def parts(self, key, size, max_size):
        used = jnp.arange(max_size) < size
        if self.config.uniform_bits:
            chosen = jax.random.bernoulli(key, shape=(max_size,))
        else:
            for_number, for_places = jax.random.split(key)
            ones = jax.random.randint(for_number, (), 0, size + 1)
            scores = jax.random.uniform(for_places, (max_size,))
            chosen = ranks(jnp.where(used, scores, 2)) < ones  # the unused ones come last
        bits, ones = jnp.where(chosen, ONE, ZERO), (chosen & used).sum()
        answer = Part(jnp.where(ones % 2 == 0, EVEN, ODD)[None], 1, scored=True)
        return token(START), Part(bits, size), token(PARITY), answer

    def is_right(self, tokens):
        odd = False
        for bit in tokens[1:-2]:
            odd ^= bool(bit == ONE)
        return tokens[-1] == (ODD if odd else EVEN)
