"""The settings of positions, evaluation and logging."""

from dataclasses import dataclass
from typing import Annotated, Literal

from posenc_jax.encodings import frequencies
from posenc_jax.results import RETRIEVAL
from posenc_jax.schema import Count, Range
from posenc_jax.training_config import Length

OF_ALL = ("contiguous", "offset", "randomized", "random_float")  # schedules of positions for text and all tasks
OF_TASKS = ("coupled", "abacus")  # schedules in which the samples of a task have positions of their own


@dataclass(frozen=True)
class PositionsConfig:
    training: Literal[(*OF_ALL, *OF_TASKS)]  # type: ignore[valid-type]
    range: Annotated[int, Range(at_least=1, at_most=2**24, why="up to which float32 counts positions")]
    per_layer: bool
    evaluation: Literal["contiguous", "drawn", "even", "interpolated"]

    @property
    def of_task(self) -> bool:
        """Whether positions come with the samples of a task."""
        return self.training in OF_TASKS

    def reach(self, length: int) -> int:
        """Upper bound of the positions of training windows of `length` tokens."""
        return length if self.training == "contiguous" else self.range


@dataclass(frozen=True)
class EvaluationConfig:
    lengths: tuple[Length, ...]
    windows: Annotated[int, Range(at_least=1, at_most=100_000)]
    tail: Count
    long_perplexity: bool
    copy_distances: tuple[Count, ...]
    copy_chunk: Annotated[int, Range(at_least=2)]
    retrieval_tasks: tuple[Literal[tuple(RETRIEVAL)], ...]  # type: ignore[valid-type]
    retrieval_lengths: tuple[Length, ...]
    retrieval_trials: Annotated[int, Range(at_least=1, at_most=10_000)]
    retrieval_depths: Annotated[int, Range(at_least=1)]
    retrieval_by: Literal["teacher_forcing", "generation"]
    rope_scalings: tuple[frequencies.EvaluationText, ...]
    batch_tokens: Count
    validation_windows: Count
    resamples: Annotated[int, Range(at_least=100)]

    @property
    def task_lengths(self) -> tuple[int, ...]:
        """The lengths of the retrieval tasks, in tokens."""
        return self.retrieval_lengths or self.lengths


@dataclass(frozen=True)
class LoggingConfig:
    wandb: str
    sample_prompt: str
    sample_tokens: Annotated[int, Range(at_least=1, at_most=10_000)]
