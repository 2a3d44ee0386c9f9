"""What a task is: random samples in which some tokens are to be predicted, and a checker of their answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num

PAD, START, STOP = 0, 1, 2  # after the end of a sample; at its beginning; at the end of an answer
FIRST = 3  # the first token that tasks use for their own symbols

Size = int | Int[Array, ""]


class Part(NamedTuple):
    """Consecutive tokens of a sample: the first `count` of `values`.

    Attributes:
      values: the tokens.
      count: how many of them the sample has.
      scored: whether each is to be predicted.
      coupled: the places of the tokens in the schedule `coupled`, from 1 on; 0: none. See `positions.of_samples`.
      number: whether they are the digits of a number, which have the places 1, 2, .. in the schedule `abacus`.
    """

    values: Int[Array, "n"]
    count: Size
    scored: bool | Bool[Array, "n"] = False
    coupled: Size | Int[Array, "n"] = 0
    number: bool = False

    def places(self, schedule: str) -> Int[Array, "n"]:
        """The places of the tokens in a schedule of `positions.of_samples`."""
        own = jnp.arange(1, len(self.values) + 1) * self.number if schedule == "abacus" else jnp.asarray(self.coupled)
        return jnp.broadcast_to(own, self.values.shape)


class Task:
    """The interface of tasks. A sample has a `size`, such as the number of symbols to copy.

    Attributes:
      train_sizes: the least and the largest size in training, where the settings give none.
      test_sizes: the sizes in evaluation, where the settings give none.
      vocab_size: the number of different tokens. Token 0 is PAD.
      least_size: the least possible size.
      largest_size: the largest possible size, or None.
      schedules: the schedules of `positions.of_samples` for which its parts have places.
    """

    train_sizes: tuple[int, int] = (1, 50)
    test_sizes: tuple[int, ...] = (25, 50, 75, 100, 150)
    vocab_size: int
    least_size: int = 1
    largest_size: int | None = None
    schedules: tuple[str, ...] = ()

    @dataclass(frozen=True)
    class Config:
        """No settings."""

    def __init__(self, config: Any):
        self.config = config

    def length(self, size: int) -> int:
        """The number of tokens that the model reads in a sample of this size: all but the last. It grows with size."""
        raise NotImplementedError

    def parts(self, key: Array, size: Size, max_size: int) -> Sequence[Part]:
        """A random sample as its consecutive parts. It is traced: `size` may be an array, of at most `max_size`."""
        raise NotImplementedError

    def is_right(self, tokens: Int[np.ndarray, "N"]) -> bool:
        """Whether the answer in a sample is right. The sample has no padding.

        It is computed from the question alone, in another way than `parts` computes it.
        """
        raise NotImplementedError

    def cases(self) -> dict[str, "Task"]:
        """The tasks that a model is tested on: by default only this one, so that samples are as in training.

        The keys are keys of `results.ANSWERS`, which name the metrics.
        """
        return {"answers": self}


def samples(
    task: Task, key: Array, sizes: Int[Array, "B"], max_size: int, schedule: str = ""
) -> Int[Array, "B 2 N"] | Int[Array, "B 3 N"]:
    """Random samples of these sizes: tokens, for each 1 if it is to be predicted, else 0, and its place in a schedule.

    Without a `schedule` of `task.schedules`, there are no places. The length is that of the largest size. Shorter
    samples end with PAD, which is not predicted.
    """
    length = task.length(max_size) + 1

    def sample(key: Array, size: Array) -> Array:
        return _joined(task.parts(key, size, max_size), length, schedule)

    return jax.vmap(sample)(jax.random.split(key, len(sizes)), sizes)


def _joined(parts: Sequence[Part], length: int, schedule: str) -> Int[Array, "P N"]:
    joined = jnp.zeros((3 if schedule else 2, length), jnp.int32)  # PAD, not scored and without a place
    index, start = jnp.arange(length), jnp.zeros((), jnp.int32)
    for part in parts:
        asked = jnp.broadcast_to(jnp.asarray(part.scored), part.values.shape)
        own = jnp.stack([part.values, asked, *([part.places(schedule)] if schedule else [])]).astype(jnp.int32)
        inside = (index >= start) & (index < start + part.count)
        joined = jnp.where(inside, own[:, jnp.clip(index - start, 0, len(part.values) - 1)], joined)
        start = start + part.count
    return joined


def token(value: int, *, scored: bool = False) -> Part:
    """A part of one token."""
    return Part(jnp.array([value]), 1, scored)


def symbols(key: Array, count: int, first: int, number: int) -> Int[Array, "count"]:
    """Random symbols, independent and uniform, of the `number` tokens from `first` on."""
    return jax.random.randint(key, (count,), first, first + number)


def distinct_symbols(key: Array, count: int, first: int, number: int) -> Int[Array, "count"]:
    """Random symbols, all different, of the `number` tokens from `first` on."""
    return first + jax.lax.top_k(jax.random.bits(key, (number,)), count)[1]


def ranks(scores: Num[Array, "n"]) -> Int[Array, "n"]:
    """The place of each score in increasing order, from 0 on. Random scores give a random order."""
    return jnp.argsort(jnp.argsort(scores))


def backwards(values: Int[Array, "n"], count: Size) -> Int[Array, "n"]:
    """The first `count` values in reverse order. Those after them have no meaning."""
    return values[jnp.maximum(count - 1 - jnp.arange(len(values)), 0)]
