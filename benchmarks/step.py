"""A single training step of a run, compiled ahead of time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state, make_train_step


@dataclass
class TrainingStep:
    """`run` does one step on a fixed batch of random tokens and returns the loss before the step.

    Call it once before timing it.
    """

    parameters: int
    compile_seconds: float  # includes tracing
    temporary_bytes: int  # of the compiled program on one device, without its inputs and outputs
    run: Callable[[], float]


def training_step(recipe: ConfigDict) -> TrainingStep:
    config = RunConfig.from_mapping(recipe.to_dict())
    graphdef, parameters = abstract_model(config)
    optimizer = optimizers.build(config.optimizer, total_steps=1000, warmup_steps=10)
    vocab_size, shape = config.data.vocab_size, (config.training.batch_size, config.training.length + 1)
    mesh = sharding.make_mesh(config.training.batch_size, fsdp=config.sharding.fsdp, tensor=config.sharding.tensor)
    state: Any = initial_state(config, optimizer, mesh)
    tokens = sharding.shard_rows(np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int32), mesh)
    begun = time.perf_counter()
    step = make_train_step(config, graphdef, optimizer, jnp.ones(vocab_size, jnp.int32))
    with jax.set_mesh(mesh):
        placed = sharding.placement(state, mesh)
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(placed, None)).lower(state, tokens).compile()
    compile_seconds = time.perf_counter() - begun

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, tokens)
        return float(metrics["loss"])

    return TrainingStep(parameters, compile_seconds, compiled.memory_analysis().temp_size_in_bytes, run)
