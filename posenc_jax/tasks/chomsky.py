"""What the tasks of Deletang et al. 2023, Neural networks and the Chomsky hierarchy, have in common."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from posenc_jax.tasks.base import STOP, Part, Size, Task


class ChomskyTask(Task):
    """A task of Deletang et al. 2023, which Ruoss et al. 2023 (randomized positions) use too.

    `size` is the length of the input as they count it: the tokens between START and the token that asks for the answer.
    They train on lengths 1 to 40, each with the same probability. Their papers test lengths 41 to 500, and the examples
    in their code those up to 100. There a model reads the input, and predicts all tokens of the answer at once. Here it
    reads those before, as in the other tasks. An answer ends with STOP only if its length does not follow from that of
    the input, as there.
    """

    train_sizes, test_sizes = (1, 40), (20, 40, 60, 80, 100)


def stopped(values: Int[Array, "n"], count: Size, places: Size) -> Part:
    """An answer in this number of places, more than `count`: the first `count` values, and STOP.

    Only the first STOP is predicted. More of them fill the rest, as the length of a sample depends only on its size.
    """
    index = jnp.arange(len(values) + 1)
    return Part(jnp.where(index < count, jnp.append(values, STOP), STOP), places, index <= count)
