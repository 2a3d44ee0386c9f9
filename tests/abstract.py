"""Traces runs from their settings only, on one device and without text, as `Session` does before a run starts."""

import jax
import numpy as np

from posenc_jax.config import RunConfig
from posenc_jax.data.pipeline import EvaluationWindows
from posenc_jax.data.tokenizers import ByteTokenizer
from posenc_jax.data.tokens import Dataset, Split
from posenc_jax.runs.program import Program

EPOCH = 10**9  # tokens


def trace(config: RunConfig) -> None:
    """Trace training and evaluation as `driver.prepare` does. Raises the same ConfigErrors, except those on text."""
    devices = jax.devices()[: config.sharding.fsdp * config.sharding.tensor]
    if config.task.name:
        Program(config, devices=devices).trace()
        return
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes = np.ones(config.data.vocab_size, np.int32)
    split = Split("train", np.broadcast_to(np.uint8(0), EPOCH), np.array([0, EPOCH]), ("zeros",), EPOCH)
    dataset = Dataset("zeros", "0", tokenizer, {"train": split})
    program = Program(config, dataset, devices)
    data = program.data
    data.validation_windows = np.zeros((min(config.evaluation.validation_windows, 64), 2), np.int32)
    data.windows = EvaluationWindows(np.zeros((min(config.evaluation.windows, 64), 2), np.int32), ())
    program.trace()
