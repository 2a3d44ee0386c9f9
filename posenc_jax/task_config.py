"""The task of a run in place of text: its settings, and the sizes of its samples."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from posenc_jax import tasks
from posenc_jax.files import sha256_of
from posenc_jax.schema import ConfigError, Count, convert, plain

if TYPE_CHECKING:
    from posenc_jax.tasks.base import Task

FORMAT = 1  # version of the random samples; other versions draw others
LENGTHS = {"training": "length", "evaluation": "lengths"}  # the settings that follow from the sizes


@dataclass(frozen=True)
class _Sizes:
    min_size: Count
    max_size: Count
    test_sizes: tuple[Count, ...]


@dataclass(frozen=True)
class TaskConfig:
    """The task of a run, checked against its class. A run on text has the name "".

    Attributes:
      name: its name in the table of tasks.
      min_size: the least size of a sample in training, such as the number of symbols to copy.
      max_size: the largest. Each sample has a random size.
      test_sizes: the sizes in the evaluation, increasing.
      settings: the `Config` of the task.
    """

    name: str = ""
    min_size: int = 0
    max_size: int = 0
    test_sizes: tuple[int, ...] = ()
    settings: Any = None

    @classmethod
    def parse(cls, value: Any, path: str) -> "TaskConfig":
        if not isinstance(value, Mapping):
            raise ConfigError(path, value, "must be a section, which is empty for a run on text")
        if not value:
            return cls()
        if "name" not in value:
            raise ConfigError(f"{path}.name", None, "is missing")
        task = tasks.load(value["name"], f"{path}.name")
        known = {field.name for field in fields(_Sizes)}
        sizes = convert(_Sizes, {key: own for key, own in value.items() if key in known}, path)
        own = {key: own for key, own in value.items() if key not in known and key != "name"}
        config = cls(value["name"], sizes.min_size, sizes.max_size, sizes.test_sizes, convert(task.Config, own, path))
        config._check(path)
        return config

    def plain(self) -> dict[str, Any]:
        if not self.name:
            return {}
        sizes = {"min_size": self.min_size, "max_size": self.max_size, "test_sizes": list(self.test_sizes)}
        return {"name": self.name, **sizes, **plain(self.settings)}

    @property
    def task(self) -> "Task":
        return _built(self.name, self.settings)

    @property
    def lengths(self) -> dict[str, Any]:
        """The tokens that the model reads in the largest samples of training, and in those of each test size."""
        length = self.task.length
        return {"training": length(self.max_size), "evaluation": tuple(map(length, self.test_sizes))}

    @property
    def fingerprint(self) -> str:
        """A checksum of what determines the samples in training and evaluation."""
        return sha256_of([FORMAT, self.plain()])

    def _check(self, path: str) -> None:
        task, sizes = self.task, self.test_sizes
        largest = task.largest_size
        named = {f"{path}.min_size": self.min_size, f"{path}.max_size": self.max_size}
        for field, size in (named | {f"{path}.test_sizes[{i}]": size for i, size in enumerate(sizes)}).items():
            if size < task.least_size or (largest is not None and size > largest):
                bounds = f"at least {task.least_size}" + ("" if largest is None else f" and at most {largest}")
                raise ConfigError(field, size, f"must be {bounds} for task {self.name!r} with these settings")
        if self.min_size > self.max_size:
            raise ConfigError(f"{path}.min_size", self.min_size, f"must be at most max_size = {self.max_size}")
        if not sizes or list(sizes) != sorted(set(sizes)):
            raise ConfigError(f"{path}.test_sizes", list(sizes), "must be one or more increasing sizes")


ON_TEXT = TaskConfig()


@functools.lru_cache(maxsize=64)
def _built(name: str, settings: Any) -> "Task":
    return tasks.load(name)(settings)


def with_lengths(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a run on a task with its lengths in tokens, where they are open (None). Others are unchanged."""
    if not (isinstance(settings, Mapping) and settings.get("task")):
        return settings
    lengths, filled = TaskConfig.parse(settings["task"], "config.task").lengths, dict(settings)
    for section, field in LENGTHS.items():
        own = settings.get(section)
        if isinstance(own, Mapping) and field in own and own[field] is None:
            filled[section] = {**own, field: lengths[section]}
    return filled
