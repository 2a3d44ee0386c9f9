"""Word problems of permutation groups: the product of many permutations."""

import itertools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from posenc_jax.tasks.base import FIRST, START, Part, Task, symbols, token

PRODUCT = FIRST  # the token between the word and its product
ELEMENT = FIRST + 1  # the token of the identity, which is the first element


class PermutationWords(Task):
    """The product of permutations: START g_1 ... g_n PRODUCT p, with `size` = n elements. Only p is predicted.

    Elements are uniform in A5, the even permutations of five things, or in S5, all of them. p is the permutation that
    applies g_1 first and g_n last. A model that reads from left to right has to remember the product so far, which has
    60 or 120 possible values. Source: Merrill et al. 2024 and its code (words of up to 20 elements). There the product
    so far is predicted after each element, but not read. A model that predicts the next token would read it, and then
    each product takes only one multiplication. So only the last one is asked for here. The test size of 30 is ours.
    """

    train_sizes, test_sizes = (1, 20), (5, 10, 15, 20, 30)

    @dataclass(frozen=True)
    class Config:
        group: Literal["a5", "s5"] = "a5"

    def __init__(self, config: Config):
        super().__init__(config)
        elements = np.array(list(itertools.permutations(range(5))))  # [120 5], in lexicographic order
        if config.group == "a5":
            elements = elements[np.linalg.det(np.eye(5)[elements]) > 0]
        self.elements, self.vocab_size = elements, ELEMENT + len(elements)
        codes = elements @ 5 ** np.arange(5)[::-1]  # increasing
        products = elements[:, elements] @ 5 ** np.arange(5)[::-1]  # [second first]
        self.table = np.searchsorted(codes, products).T  # [first second] -> product

    def length(self, size):
        return size + 2

    def parts(self, key, size, max_size):
        word = symbols(key, max_size, 0, len(self.elements))
        used = jnp.where(jnp.arange(max_size) < size, word, 0)  # the unused ones are the identity
        table = jnp.asarray(self.table)
        products = jax.lax.associative_scan(lambda first, second: table[first, second], used)
        return token(START), Part(ELEMENT + word, size), token(PRODUCT), Part(ELEMENT + products[-1:], 1, scored=True)

    def is_right(self, tokens):
        place = list(range(5))  # of each thing
        for element in self.elements[tokens[1:-2] - ELEMENT].tolist():
            place = [element[i] for i in place]
        return tokens[-1] >= ELEMENT and self.elements[tokens[-1] - ELEMENT].tolist() == place
