"""Regular languages of Deletang et al. 2023: even pairs and cycle navigation."""

import jax.numpy as jnp

from posenc_jax.tasks.base import FIRST, START, Part, symbols, token
from posenc_jax.tasks.chomsky import ChomskyTask
from posenc_jax.tasks.parity import EVEN, ODD, ONE, PARITY, ZERO

POSITION = FIRST  # the token between the steps and the last position
LEFT, RIGHT = FIRST + 1, FIRST + 3  # the steps; STAY is between them
CIRCLE = FIRST + 4  # the token of position 0
POSITIONS = 5  # on the circle


class EvenPairs(ChomskyTask):
    """Whether the pairs 01 and 10 of neighbours are even in number: START x PARITY y, with `size` bits x.

    Only y, which is EVEN or ODD, is predicted. Bits are uniform. The answer is EVEN if the first bit is also the last,
    so most bits do not matter. Source: Deletang et al. 2023 and its code.
    """

    vocab_size = ONE + 1

    def length(self, size):
        return size + 2

    def parts(self, key, size, max_size):
        bits = symbols(key, max_size, ZERO, 2)
        unequal = (bits[1:] != bits[:-1]) & (jnp.arange(1, max_size) < size)
        answer = jnp.where(unequal.sum() % 2 == 0, EVEN, ODD)
        return token(START), Part(bits, size), token(PARITY), Part(answer[None], 1, scored=True)

    def is_right(self, tokens):
        return tokens[-1] == (EVEN if tokens[1] == tokens[-3] else ODD)


class CycleNavigation(ChomskyTask):
    """The position after steps on a circle of five positions: START x POSITION y, with `size` steps x.

    Steps are LEFT, STAY and RIGHT, and uniform. The first position is 0. Only the last one, y, is predicted. Source:
    Deletang et al. 2023 and its code.
    """

    vocab_size = CIRCLE + POSITIONS

    def length(self, size):
        return size + 2

    def parts(self, key, size, max_size):
        steps = symbols(key, max_size, -1, 3)
        last = jnp.where(jnp.arange(max_size) < size, steps, 0).sum() % POSITIONS
        shown = Part(steps + LEFT + 1, size)
        return token(START), shown, token(POSITION), Part(CIRCLE + last[None], 1, scored=True)

    def is_right(self, tokens):
        circle = list(range(POSITIONS))  # the position of the walker is the first
        for step in tokens[1:-2].tolist():
            if step == RIGHT:
                circle = [*circle[1:], circle[0]]
            elif step == LEFT:
                circle = [circle[-1], *circle[:-1]]
        return tokens[-1] == CIRCLE + circle[0]
