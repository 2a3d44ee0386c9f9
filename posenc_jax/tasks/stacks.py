"""Stack manipulation (Deletang et al. 2023): what a stack contains after PUSH and POP."""

import jax
import jax.numpy as jnp

from posenc_jax.tasks.base import FIRST, START, STOP, Part, symbols, token
from posenc_jax.tasks.chomsky import ChomskyTask, stopped

STACK = FIRST  # the token between the actions and the last stack
POP, PUSH = FIRST + 1, FIRST + 2  # PUSH is that of bit 0; that of bit 1 comes after it
BIT = FIRST + 4  # the token of bit 0


class StackManipulation(ChomskyTask):
    """The stack after actions: START s a STACK y STOP, with `size` tokens in s and a together.

    s is a stack of bits, whose top is the last one. The actions a are POP, PUSH 0 and PUSH 1, each of them one token.
    POP of an empty stack does nothing. y is the last stack, from top to bottom. y and the first STOP are predicted, and
    more of STOP fill `size` + 1 places. Bits and actions are uniform. The length of s is uniform between 1 and
    `size` - 1, and 1 if `size` is 1. Source: Deletang et al. 2023 and its code.
    """

    vocab_size = BIT + 2

    def length(self, size):
        return 2 * size + 2

    def parts(self, key, size, max_size):
        for_height, for_bits, for_actions = jax.random.split(key, 3)
        places, first = jnp.arange(max_size), jax.random.randint(for_height, (), 1, jnp.maximum(size, 2))
        given = symbols(for_bits, max_size, 0, 2)
        actions = symbols(for_actions, max_size, POP, 3)
        tokens = jnp.where(places < first, BIT + given, actions)
        bits = jnp.where(places < first, given, actions - PUSH)  # that are pushed
        pops = (places >= first) & (actions == POP)
        change = jnp.where(places < size, jnp.where(pops, -1, 1), 0)
        unbounded = jnp.cumsum(change)
        heights = unbounded - jnp.minimum(jax.lax.cummin(unbounded), 0)  # POP of an empty stack does nothing
        kept = (change > 0) & (heights <= jax.lax.cummin(heights, reverse=True))
        from_top = jnp.where(kept, heights[-1] - heights, max_size)  # of each bit; the last place is none
        answer = jnp.zeros(max_size, jnp.int32).at[from_top].set(BIT + bits, mode="drop")
        return token(START), Part(tokens, size), token(STACK), stopped(answer, heights[-1], size + 1)

    def is_right(self, tokens):
        middle = tokens.tolist().index(STACK)
        stack = []
        for action in tokens[1:middle].tolist():
            if action != POP:
                stack.append(action - BIT if action >= BIT else action - PUSH)
            elif stack:
                stack.pop()
        answer = tokens[middle + 1 :].tolist()
        return answer[: len(stack) + 1] == [*(BIT + bit for bit in reversed(stack)), STOP]
