"""Addition of numbers with many digits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from posenc_jax.tasks.base import FIRST, START, STOP, Part, Task, backwards, symbols, token

PLUS, EQUALS = FIRST, FIRST + 1
DIGIT = FIRST + 2  # the token of digit 0


class Addition(Task):
    """Add two numbers: START a PLUS b EQUALS c STOP, with `size` digits in a and b, and one more in c.

    All digits of a and b are uniform, so numbers may begin with zeros. c and STOP are predicted. If `reversed`, c
    begins with its least significant digit, so that carries move in the direction of reading. Source: position coupling
    (Cho et al. 2024) and its code (reversed, with leading zeros; trained to 30 digits and tested to 200). There a and b
    differ in their numbers of digits, which are uniform, before zeros are added. Coupled positions are equal for digits
    of the same significance. McLeish et al. 2024 (Abacus) reverse a and b too, as `reversed_terms` does: their digits
    are then aligned by their places in the numbers.
    """

    schedules = ("coupled", "abacus")
    train_sizes, test_sizes = (1, 30), (15, 30, 50, 100, 200)
    vocab_size = DIGIT + 10

    @dataclass(frozen=True)
    class Config:
        reversed: bool = True
        reversed_terms: bool = False

    def length(self, size):
        return 3 * size + 4

    def parts(self, key, size, max_size):
        drawn = symbols(key, 2 * max_size, 0, 10).reshape(2, max_size)
        used = jnp.where(jnp.arange(max_size) < size, drawn, 0)  # the least significant digit is the first
        answer = carried(jnp.append(used.sum(0), 0), 10)
        if not self.config.reversed:
            answer = backwards(answer, size + 1)
        terms = used if self.config.reversed_terms else [backwards(digits, size) for digits in used]
        # From the most significant digit on, as in the authors' code: c has 1, 2, .. and the terms 2, 3, ..
        falling, after = size + 1 - jnp.arange(max_size + 1), size + 2
        rising = jnp.arange(max_size + 1) + 1
        of_terms = falling[:-1] if self.config.reversed_terms else rising[1:]
        left, right = (Part(DIGIT + digits, size, False, of_terms, number=True) for digits in terms)
        of_answer = falling if self.config.reversed else rising
        written = Part(DIGIT + answer, size + 1, True, of_answer, number=True)
        plus, equals = (token(value)._replace(coupled=after) for value in (PLUS, EQUALS))
        return token(START), left, plus, right, equals, written, token(STOP, scored=True)

    def is_right(self, tokens):
        text = "".join(str(digit) if 0 <= digit < 10 else " " for digit in tokens[1:-1] - DIGIT)
        left, right, answer = text.split(" ", 2)
        if self.config.reversed_terms:
            left, right = left[::-1], right[::-1]
        total = str(int(left) + int(right)).zfill(len(left) + 1)
        return answer == (total[::-1] if self.config.reversed else total) and tokens[-1] == STOP


def carried(sums: Int[Array, "n"], base: int) -> Int[Array, "n"]:
    """The digits of a sum, from sums of two digits. The least significant one is the first, and the last sum is 0."""
    places = jnp.arange(len(sums))
    deciding = jax.lax.cummax(jnp.where(sums == base - 1, -1, places))  # base - 1 hands on the carry that it gets
    carries = sums[deciding] >= base  # of each place; -1 is the last one, which has no carry
    return (sums + jnp.append(0, carries[:-1])) % base
