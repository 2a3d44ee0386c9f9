"""The log of a run during training: metrics.jsonl and TensorBoard."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posenc_jax.distributed import hosts
from posenc_jax.reporting.metrics_log import MetricsLog
from posenc_jax.reporting.tensorboard import TensorBoard


class RunLogger(contextlib.ExitStack):
    """A context manager that logs the steps after `start_step`. Only process 0 writes."""

    def __init__(self, workdir: Path, start_step: int):
        super().__init__()
        self._log = self._board = None
        if hosts.is_leader():
            self._log = self.enter_context(MetricsLog(workdir / "metrics.jsonl", start_step))
            self._board = self.enter_context(TensorBoard(workdir / "tensorboard", purge_step=start_step + 1))

    def trained(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step, and the number of tokens trained on so far."""
        self._write({"step": step, "tokens": tokens, **values}, {f"train/{name}": x for name, x in values.items()})

    def validated(self, step: int, values: Mapping[str, Any]) -> None:
        self._write({"step": step, **values}, {name.replace("_", "/", 1): x for name, x in values.items()})

    def _write(self, entry: dict[str, Any], scalars: dict[str, Any]) -> None:
        if self._log is not None and self._board is not None:
            self._log.write(entry)
            self._board.scalars(entry["step"], scalars)
            self._board.flush()  # a killed process then leaves the same steps in both logs
