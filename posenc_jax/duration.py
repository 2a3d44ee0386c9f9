"""Durations of training, in steps, tokens or epochs."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from posenc_jax.schema import ConfigError

LONGEST = 1e15  # units of a duration


@dataclass(frozen=True)
class Duration:
    """A duration in the unit in which it was given: "700 steps", "3e6 tokens" or "2 epochs"."""

    amount: float
    unit: Literal["steps", "tokens", "epochs"]

    @classmethod
    def parse(cls, value: Any, path: str) -> "Duration":
        allowed = 'must be a string such as "700 steps", "3e6 tokens" or "2 epochs"'
        text = value if type(value) is str else ""
        match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?) *(step|token|epoch)s?", text)
        if match is None:
            raise ConfigError(path, value, allowed)
        try:
            amount = float(match[1])
        except ValueError:
            raise ConfigError(path, value, allowed) from None
        if amount > LONGEST:
            raise ConfigError(path, value, f"{allowed}, of at most {LONGEST:g}")
        return cls(amount, match[2] + "s")  # type: ignore[arg-type]

    def plain(self) -> str:
        return f"{self.amount:.17g} {self.unit}"

    def steps(self, *, tokens_per_step: int, tokens_per_epoch: int) -> int:
        """Whole steps, rounded up."""
        tokens = {"steps": tokens_per_step, "tokens": 1, "epochs": tokens_per_epoch}[self.unit] * self.amount
        return math.ceil(tokens / tokens_per_step)
