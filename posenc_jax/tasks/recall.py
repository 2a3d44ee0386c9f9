"""Associative recall: keys get values, and later the values of keys are asked for."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

from posenc_jax.schema import Positive, Range
from posenc_jax.tasks.base import FIRST, START, Part, Task, distinct_symbols, ranks, symbols, token

Vocabulary = Annotated[int, Range(at_least=12, why="of which half are values")]

SLOTS = 3  # places per key at which it could be asked for

WRITE, READ = FIRST, FIRST + 1
TIMES = 8  # instructions per key


class MQAR(Task):
    """Multi-query associative recall: START, `size` pairs of key and value, then each key once more with its value.

    Keys and values are different tokens, drawn without replacement from two halves of the vocabulary. Keys are asked
    for in a random order, at random ones of 3 `size` slots of two tokens. Slot s = 1, 2, ... has the weight
    s^(power - 1), so most questions come early. The other slots have random values. The values after questions are
    predicted.

    Source: Arora et al. 2023 (Zoology) and its code, which has 4 to 64 pairs in training and 4 to 256 in evaluation,
    and 4 to 16 tokens per pair; here there are 8. There the token after a question is random in the input; here it is
    the answer. There other slots have tokens of the whole vocabulary; here they have only values, so that questions can
    be told from them.
    """

    train_sizes, test_sizes = (4, 64), (16, 32, 64, 128)

    @dataclass(frozen=True)
    class Config:
        vocabulary: Vocabulary = 8192
        power: Positive = 0.01  # 1: all slots have the same weight

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.first_value = config.vocabulary, config.vocabulary // 2
        self.largest_size = self.first_value - FIRST

    def length(self, size):
        return (2 + 2 * SLOTS) * size

    def parts(self, key, size, max_size):
        for_keys, for_values, for_slots, for_others = jax.random.split(key, 4)
        values = self.first_value, self.vocab_size - self.first_value
        keys = distinct_symbols(for_keys, max_size, FIRST, self.first_value - FIRST)
        pairs = jnp.stack([keys, distinct_symbols(for_values, max_size, *values)], axis=1)
        slots = jnp.arange(SLOTS * max_size)
        # The order of these scores is that of draws by weight without replacement.
        scores = (self.config.power - 1) * jnp.log(slots + 1) + jax.random.gumbel(for_slots, slots.shape)
        index = ranks(-jnp.where(slots < SLOTS * size, scores, -jnp.inf))
        asked = index < size
        others = symbols(for_others, 2 * len(slots), *values).reshape(-1, 2)
        filled = jnp.where(asked[:, None], pairs[jnp.minimum(index, max_size - 1)], others)
        scored = jnp.stack([jnp.zeros_like(asked), asked], axis=1)
        shown = Part(pairs.reshape(-1), 2 * size)
        return token(START), shown, Part(filled.reshape(-1), 2 * SLOTS * size, scored.reshape(-1))

    def is_right(self, tokens):
        pairs = tokens[1:].reshape(-1, 2).tolist()
        size = len(pairs) // (1 + SLOTS)
        value = dict(pairs[:size])
        return all(value[left] == right for left, right in pairs[size:] if left in value)


class MQRAR(Task):
    """Multi-query repeated associative recall, N back: READ asks for the value that a key got `back` writes ago.

    START and instructions of three tokens: WRITE key value, or READ key value. The values after READ are predicted. A
    sample has `size` keys, and 8 instructions for each in a random order. The first `back` for a key are WRITE, and the
    last is READ. The others are either with equal probability. With `back` = 1, the last value is asked for.

    Source: PaTH (Yang et al. 2025), section 4.1 (`back` = 1 to 4; 32 keys in 768 tokens, as here), after Tan et al.
    2025. There a key that appears again asks for a value and gets a new one, both at the same token. A model that
    predicts the next token cannot do both, so the two instructions are ours. The papers do not give the vocabulary: it
    is that of MQAR.
    """

    train_sizes, test_sizes = (4, 32), (8, 16, 32, 64)

    @dataclass(frozen=True)
    class Config:
        back: Annotated[int, Range(at_least=1, at_most=TIMES - 1)] = 2
        vocabulary: Vocabulary = 8192

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.first_value = config.vocabulary, config.vocabulary // 2
        self.largest_size = self.first_value - (READ + 1)

    def length(self, size):
        return 3 * TIMES * size

    def parts(self, key, size, max_size):
        for_keys, for_values, for_kinds, for_order = jax.random.split(key, 4)
        shape, turn = (max_size, TIMES), jnp.arange(TIMES)
        keys = distinct_symbols(for_keys, max_size, READ + 1, self.first_value - (READ + 1))
        drawn = symbols(for_values, max_size * TIMES, self.first_value, self.vocab_size - self.first_value)
        drawn = drawn.reshape(shape)
        writes = jax.random.bernoulli(for_kinds, 0.5, shape) & (turn < TIMES - 1) | (turn < self.config.back)
        written = jnp.take_along_axis(drawn, jnp.argsort(~writes, axis=1), axis=1)  # values of a key, oldest first
        number = jnp.cumsum(writes, axis=1)  # of values so far
        asked = jnp.take_along_axis(written, jnp.maximum(number - self.config.back, 0), axis=1)
        kinds, values = jnp.where(writes, WRITE, READ), jnp.where(writes, drawn, asked)
        instructions = jnp.stack([kinds, jnp.broadcast_to(keys[:, None], shape), values], axis=-1)
        scored = jnp.stack([jnp.zeros_like(writes), jnp.zeros_like(writes), ~writes], axis=-1)
        times = jnp.sort(jax.random.uniform(for_order, shape), axis=1)
        order = jnp.argsort(jnp.where(jnp.arange(max_size)[:, None] < size, times, 2).reshape(-1))
        joined = [x.reshape(-1, 3)[order].reshape(-1) for x in (instructions, scored)]
        return token(START), Part(joined[0], 3 * TIMES * size, joined[1])

    def is_right(self, tokens):
        values = defaultdict(list)
        for kind, key, value in tokens[1:].reshape(-1, 3).tolist():
            if kind == WRITE:
                values[key].append(value)
            elif values[key][-self.config.back] != value:
                return False
        return True
