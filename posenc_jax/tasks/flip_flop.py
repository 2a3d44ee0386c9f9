"""The flip-flop language: a bit is written, and later read, among instructions to be ignored."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from posenc_jax.schema import Fraction
from posenc_jax.tasks.base import FIRST, START, Part, Task, symbols, token

WRITE, READ, IGNORE = FIRST, FIRST + 1, FIRST + 2
BIT = FIRST + 3  # the token of bit 0; that of bit 1 comes after it


class FlipFlop(Task):
    """Remember one bit: START and `size` instructions, each followed by a bit. The bits after READ are predicted.

    The first instruction is WRITE and the last is READ. The others are IGNORE with probability `ignored`, else WRITE or
    READ with equal probability. The bit after READ is the one that was written last. Other bits are random. The
    evaluation adds sparse samples, in which the bit was written long ago, and dense samples. Source: Liu et al. 2023
    (512 tokens; `ignored` is 0.8 in training, and 0.98 or 0.1 in evaluation). START is ours.
    """

    train_sizes, test_sizes = (256, 256), (256,)
    vocab_size = BIT + 2
    least_size = 2

    @dataclass(frozen=True)
    class Config:
        ignored: Fraction = 0.8

    def length(self, size):
        return 2 * size

    def parts(self, key, size, max_size):
        for_kinds, for_bits = jax.random.split(key)
        places, drawn = jnp.arange(max_size), jax.random.uniform(for_kinds, (max_size,))
        used = jnp.where(drawn < (1 + self.config.ignored) / 2, WRITE, READ)
        kinds = jnp.where(drawn < self.config.ignored, IGNORE, used)
        kinds = jnp.where(places == 0, WRITE, jnp.where(places == size - 1, READ, kinds))
        reads, bits = kinds == READ, symbols(for_bits, max_size, BIT, 2)
        last_write = jax.lax.cummax(jnp.where(kinds == WRITE, places, 0))
        bits = jnp.where(reads, bits[last_write], bits)
        instructions = jnp.stack([kinds, bits], axis=1)
        scored = jnp.stack([jnp.zeros_like(reads), reads], axis=1)
        return token(START), Part(instructions.reshape(-1), 2 * size, scored.reshape(-1))

    def is_right(self, tokens):
        memory = None
        for kind, bit in zip(tokens[1::2], tokens[2::2], strict=True):
            if kind == WRITE:
                memory = bit
            elif kind == READ and bit != memory:
                return False
        return True

    def cases(self):
        """Samples as in training, sparse samples (98% IGNORE) and dense samples (10% IGNORE)."""
        shares = {"sparse_answers": 0.98, "dense_answers": 0.1}
        return {"answers": self} | {
            metric: FlipFlop(replace(self.config, ignored=share)) for metric, share in shares.items()
        }
