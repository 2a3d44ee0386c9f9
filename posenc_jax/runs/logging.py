"""What is told of a run while it trains: metrics.jsonl, TensorBoard and the terminal."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posenc_jax.distributed import hosts
from posenc_jax.reporting.metrics_log import MetricsLog
from posenc_jax.reporting.progress import Progress
from posenc_jax.reporting.tensorboard import TensorBoard


class RunLogger(contextlib.ExitStack):
    """Tells of the steps after `start_step`; a context manager. Of many processes the first alone writes."""

    def __init__(self, workdir: Path, start_step: int, total_steps: int):
        super().__init__()
        self._log = self._board = None
        if hosts.is_leader():
            self._log = self.enter_context(MetricsLog(workdir / "metrics.jsonl", start_step))
            self._board = self.enter_context(TensorBoard(workdir / "tensorboard", purge_step=start_step + 1))
        self._progress = self.enter_context(Progress(total_steps, start_step=start_step))

    def message(self, text: str) -> None:
        self._progress.message(text)

    def trained(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Tell of a step that is logged, with the tokens that were trained on so far."""
        self._write({"step": step, "tokens": tokens, **values}, {f"train/{name}": x for name, x in values.items()})
        self._progress.update(step, values)

    def validated(self, step: int, values: Mapping[str, Any]) -> None:
        self._write({"step": step, **values}, {name.replace("_", "/", 1): x for name, x in values.items()})
        self.message(f"step {step}  validation {values['validation_bits_per_byte']:.4f} bits per byte")

    def _write(self, entry: dict[str, Any], scalars: dict[str, Any]) -> None:
        if self._log is not None and self._board is not None:
            self._log.write(entry)
            self._board.scalars(entry["step"], scalars)
            self._board.flush()  # so that a process that is killed leaves the curves that it leaves the log of
