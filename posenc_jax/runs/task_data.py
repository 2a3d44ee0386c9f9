"""What runs on a task are trained and measured on: random samples."""

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from posenc_jax.config import RunConfig
from posenc_jax.evaluation import answers, extrapolation
from posenc_jax.evaluation.scoring import ScoredModel
from posenc_jax.evaluation.window_sums import Key, WindowSums
from posenc_jax.tasks.base import Task, samples

CHUNK = 16  # batches that one call draws
TRAIN, VALIDATION, TEST = range(3)  # streams of random samples


class TaskData:
    """The samples of a task that the runs of a program read. Those of validation and evaluation are always the same."""

    token_bytes = None
    documents: Sequence[str] = ()
    epoch_tokens = 0

    def __init__(self, config: RunConfig):
        self._config, self._own = config, config.task
        self._schedule = config.positions.training if config.positions.of_task else ""

    @functools.cached_property
    def validation_windows(self) -> Int[np.ndarray, "W N"]:
        """The tokens of the samples of validation."""
        return self._validation[:, 0]

    @property
    def validation_positions(self) -> Int[np.ndarray, "W T"] | None:
        """The positions of these tokens, None for those of all windows."""
        return answers.own_positions(self._config, self._validation)

    @functools.cached_property
    def _validation(self) -> Int[np.ndarray, "W P N"]:
        """Samples of sizes as in training."""
        key, count = _stream(VALIDATION, "", 0), self._config.evaluation.validation_windows
        return np.asarray(jax.jit(self._drawn, static_argnums=1)(key, count))

    def batches(self, seed: int, start_step: int, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The training batches of a run from a step on, in the form of `samples`.

        A batch depends only on the seed and the step. With `rows`, only these rows of each batch are yielded.
        """
        key = _stream(TRAIN, "", seed)
        for first in range(start_step, 2**31, CHUNK):
            steps = jnp.arange(CHUNK, dtype=jnp.uint32) + np.uint32(first)
            for batch in np.asarray(self._of_steps(key, steps)):
                yield batch if rows is None else batch[rows]

    @functools.cached_property
    def _of_steps(self) -> Any:
        size = self._config.training.batch_size
        of_step = lambda key, step: self._drawn(jax.random.fold_in(key, step), size)  # noqa: E731
        return jax.jit(jax.vmap(of_step, (None, 0)))

    def _drawn(self, key: Array, count: int) -> Int[Array, "count P N"]:
        """Samples of random sizes, as in training."""
        own, (size_key, sample_key) = self._own, jax.random.split(key)
        sizes = jax.random.randint(size_key, (count,), own.min_size, own.max_size + 1)
        return samples(own.task, sample_key, sizes, own.max_size, self._schedule)

    def validate(self, model: ScoredModel) -> dict[str, float]:
        """Loss in nats per scored token, and the share of the scored tokens that the model predicts."""
        found = answers.answer(model, self._validation, self._config.training.length)
        loss, accuracy = found.nats.sum() / found.items.sum(), found.right.sum() / found.items.sum()
        return {"validation_loss": float(loss), "validation_accuracy": float(accuracy)}

    @staticmethod
    def headline(values: dict[str, Any]) -> str:
        """The main result of a validation."""
        return f"validation accuracy {values['validation_accuracy']:.4f}"

    def measure(self, model: ScoredModel) -> WindowSums:
        """The answers to the samples of each test size, under every scaling rule; None for sizes it cannot read."""
        measured: WindowSums = {}
        longest = max(self._readable(model), default=0)
        for case, task in self._own.task.cases().items():
            for size in self._own.test_sizes:
                by_rule = answers.under_rules(model, self._tested(case, task, size, longest), task.length(size))
                measured |= {Key(rule, case, size): found for rule, found in by_rule.items()}
        return measured

    def _tested(self, case: str, task: Task, size: int, longest: int) -> Int[np.ndarray, "W P N"]:
        """The samples of one size, padded to the length of the `longest`, so that one program scores all sizes."""
        key, sizes = _stream(TEST, case, size), jnp.full(self._config.evaluation.windows, size)
        drawn = np.asarray(jax.jit(samples, static_argnums=(0, 3, 4))(task, key, sizes, size, self._schedule))
        return np.pad(drawn, [(0, 0), (0, 0), (0, max(longest + 1 - drawn.shape[2], 0))])

    def _readable(self, model: ScoredModel) -> list[int]:
        """The lengths of the evaluation that the model can read, in tokens, or all if each sample has its positions."""
        lengths, own = self._config.evaluation.lengths, bool(self._schedule)
        return [length for length in lengths if own or extrapolation.can_read(model, length)]

    def trace_validation(self, model: ScoredModel) -> None:
        """Trace what `validate` computes, with abstract arrays."""
        answers.trace(model, len(self._validation), self._config.training.length)

    def trace_measures(self, model: ScoredModel) -> None:
        """Trace the evaluation of the largest readable samples, with abstract arrays."""
        if readable := self._readable(model):
            answers.trace(model, self._config.evaluation.windows, readable[-1])

    def record(self) -> dict[str, Any]:
        """What config.json says about the task and its samples."""
        count = self._config.evaluation.windows
        return {
            "data": {"name": f"task {self._own.name}", "fingerprint": self._own.fingerprint, "splits": {}},
            "windows": {"asked": count, "found": count, "documents": 0},
        }


def _stream(kind: int, case: str, number: int) -> Array:
    """The key of one stream of random samples."""
    key = jax.random.fold_in(jax.random.key(zlib.crc32(case.encode())), kind)
    return jax.random.fold_in(key, number)
