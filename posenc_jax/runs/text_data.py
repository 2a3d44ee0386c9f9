"""What runs on text are trained and measured on: windows of a corpus."""

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from posenc_jax.config import RunConfig
from posenc_jax.data import pipeline
from posenc_jax.data.tokens import Dataset
from posenc_jax.evaluation import copying, extrapolation, retrieval
from posenc_jax.evaluation.scoring import ScoredModel, evaluation_positions
from posenc_jax.evaluation.window_sums import WindowSums


class TextData:
    """The windows of a corpus that the runs of a program read."""

    validation_positions = None  # those of all windows

    def __init__(self, config: RunConfig, dataset: Dataset):
        self._config, self.dataset = config, dataset
        self.token_bytes = jnp.asarray(dataset.tokenizer.token_bytes)

    @functools.cached_property
    def windows(self) -> pipeline.EvaluationWindows:
        """Windows of the test split for evaluation."""
        evaluation, options = self._config.evaluation, {}
        if self._config.evaluates_only and self._config.data.test_fraction < 1:
            options["remedy"] = "; config.data.test_fraction=1 puts all text into this split"
        test, count = self.dataset.splits["test"], evaluation.windows
        return pipeline.evaluation_windows(test, length=evaluation.lengths[-1], count=count, **options)

    @functools.cached_property
    def validation_windows(self) -> np.ndarray:
        """Windows of the validation split, int32 [W, N], for validation during training."""
        config = self._config
        count, length = config.evaluation.validation_windows, config.validation_length
        split = self.dataset.splits["validation"]
        field = "config.training.length" if length == config.training.length else "config.evaluation.lengths"
        return pipeline.evaluation_windows(split, length=length, count=count, field=field).tokens

    @property
    def documents(self) -> tuple[str, ...]:
        """The document of each window of the evaluation."""
        return self.windows.documents

    @property
    def epoch_tokens(self) -> int:
        """Tokens of an epoch of training."""
        config = self._config
        return pipeline.epoch_tokens(self.dataset.splits["train"], config.training.length, config.packed)

    def batches(self, seed: int, start_step: int, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The training batches of a run from a step on; see `pipeline.training_batches`."""
        length, batch_size = self._config.training.length, self._config.training.batch_size
        options = {"seed": seed, "start_step": start_step, "rows": rows, "packed": self._config.packed}
        return pipeline.training_batches(self.dataset.splits["train"], length=length, batch_size=batch_size, **options)

    def validate(self, model: ScoredModel) -> dict[str, float]:
        """Validation loss in nats per token and in bits per byte."""
        losses = extrapolation.score(model, self.validation_windows, self.dataset.tokenizer.token_bytes)
        return {"validation_loss": losses.nats_per_token, "validation_bits_per_byte": losses.bits_per_byte}

    @staticmethod
    def headline(values: dict[str, Any]) -> str:
        """The main result of a validation."""
        return f"validation {values['validation_bits_per_byte']:.4f} bits per byte"

    def measure(self, model: ScoredModel) -> WindowSums:
        """Sums over each evaluation window, from which all results of a run are computed."""
        windows, token_bytes = self.windows, self.dataset.tokenizer.token_bytes
        measured = extrapolation.measure_lengths(model, windows.tokens, token_bytes)
        measured |= copying.measure_copies(model, windows.tokens, token_bytes, windows.documents)
        return measured | retrieval.measure_tasks(model, windows.tokens, self.dataset.tokenizer)

    def trace_validation(self, model: ScoredModel) -> None:
        """Trace what `validate` computes, with abstract arrays."""
        self._trace(model, len(self.validation_windows), self._config.validation_length)

    def trace_measures(self, model: ScoredModel) -> None:
        """Trace the evaluation at the longest readable length, and retrieval. Raises ConfigError if it cannot work."""
        config, windows = model.config, len(self.windows.tokens)
        evaluation = config.evaluation
        if readable := [length for length in evaluation.lengths if extrapolation.can_read(model, length)]:
            self._trace(model, windows, readable[-1])
        for distance in evaluation.copy_distances if windows > 1 else ():
            if extrapolation.can_read(model, length := copying.window_length(config, distance)):
                self._trace(model, 2 * windows, length)  # each window, with and without the first copy
        for _ in retrieval.all_trials(config, self.windows.tokens, self.dataset.tokenizer):
            pass  # raises ConfigError if a text is too short

    def record(self) -> dict[str, Any]:
        """What config.json says about the text and the windows."""
        splits = {
            name: {"documents": len(split.names), "tokens": len(split.tokens), "bytes": int(split.num_bytes)}
            for name, split in self.dataset.splits.items()
        }
        names = {"name": self.dataset.name, "fingerprint": self.dataset.fingerprint}
        tokenizer = self.dataset.tokenizer.fingerprint
        found = {"found": len(self.documents), "documents": len(set(self.documents))}
        return {
            "data": names | {"tokenizer": tokenizer, "splits": splits},
            "windows": {"asked": self._config.evaluation.windows, **found},
        }

    def _trace(self, model: ScoredModel, count: int, length: int) -> None:
        places = evaluation_positions(model.config, length)
        arrays = model.params, model.constants
        model.scorer.trace(*arrays, count, length, places, masks_tokens=model.config.masks_tokens)
