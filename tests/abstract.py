"""Traces runs from their settings only, on one device and without text, as `Session` does before a run starts."""

import jax
import numpy as np

from posenc_jax.config import RunConfig
from posenc_jax.data.tokenizers import ByteTokenizer
from posenc_jax.data.tokens import Dataset, Split
from posenc_jax.distributed import sharding
from posenc_jax.evaluation.attention_stats import AttentionStats
from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.runs import train
from posenc_jax.runs.rehearsal import rehearse
from posenc_jax.training import memory, step
from posenc_jax.training.schedule import Schedule

EPOCH = 10**9  # tokens


def trace(config: RunConfig) -> None:
    """Trace training and evaluation as `run.Session` does. Raises the same ConfigErrors, except those on text."""
    training, axes = config.training, config.sharding
    rows, devices = training.batch_size // training.grad_accum_steps, jax.devices()[: axes.fsdp * axes.tensor]
    mesh = sharding.make_mesh(rows, devices, fsdp=axes.fsdp, tensor=axes.tensor)
    memory.check_fits(config, mesh)
    (encoded, parameters), (dropped, _) = (step.abstract_model(config, dropped=drop) for drop in (False, True))
    memory.check_fits(config, mesh, parameters)
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes = np.ones(config.data.vocab_size, np.int32)
    split = Split("train", np.broadcast_to(np.uint8(0), EPOCH), np.array([0, EPOCH]), ("zeros",), EPOCH)
    rehearse(
        config,
        Schedule.of(config, EPOCH),
        mesh,
        train.programs(config, Dataset("zeros", "0", tokenizer, {"train": split}), mesh),
        [Scorer(graphdef, mesh, config.evaluation.batch_tokens) for graphdef in (encoded, dropped)],
        [AttentionStats(graphdef, mesh) for graphdef in (encoded, dropped)],
        validation_windows=min(config.evaluation.validation_windows, 64),
        windows=min(config.evaluation.windows, 64),
    )
