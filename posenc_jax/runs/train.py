"""The training loop: compiles the step, feeds it, logs, validates, checkpoints, and stops when told to."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posenc_jax.distributed import hosts
from posenc_jax.config import RunConfig
from posenc_jax.data import pipeline
from posenc_jax.data.tokens import Dataset
from posenc_jax.files import replacing
from posenc_jax.schema import ConfigError
from posenc_jax.training import flops
from posenc_jax.distributed import sharding
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.checkpoint import Checkpoints, check_step
from posenc_jax.runs.logging import RunLogger
from posenc_jax.training.schedule import Schedule
from posenc_jax.training.step import State, TrainSteps, abstract_model, initial_state, make_train_step, repeated
from posenc_jax.runs.stopping import Stopped, stop_signals

UNPROFILED = 5  # steps of a process before those it traces

# (params, constants, whether the encoding is dropped) ->
#     {"validation_loss": nats per token, "validation_bits_per_byte": bits}, and what is to be logged beside them:
#     a number, or one for each layer
Validate = Callable[[Any, Any, bool], dict[str, Any]]


class NonFiniteLoss(Exception):
    """The loss or its gradient is not finite; the last checkpoint, which is finite, is kept."""

    exit_code = 3


Programs = Callable[[bool], TrainSteps]  # whether the encoding is dropped -> the steps to take


def programs(config: RunConfig, dataset: Dataset, mesh: Mesh) -> Programs:
    """The compiled steps of a run, which serve all runs that can be members of one program with it."""
    schedule = Schedule.of(config, pipeline.epoch_tokens(dataset.splits["train"], config.training.length))
    optimizer = optimizers.build(config.optimizer, total_steps=schedule.total, warmup_steps=schedule.warmup)
    token_bytes = jnp.asarray(dataset.tokenizer.token_bytes)
    placed = sharding.placement(jax.eval_shape(lambda: initial_state(config, optimizer)), mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    @functools.cache
    def train_steps(dropped: bool) -> TrainSteps:
        graphdef, _ = abstract_model(config, dropped=dropped)
        train_step = make_train_step(config, graphdef, optimizer, token_bytes)
        return jax.jit(repeated(train_step), donate_argnums=0, out_shardings=(placed, everywhere))

    return train_steps


def train(
    config: RunConfig,
    dataset: Dataset,
    mesh: Mesh,
    workdir: Path,
    validate: Validate,
    *,
    launched: float,
    train_steps: Programs | None = None,
    params: Any = None,
    begin: Callable[[int], None] = lambda step: None,
) -> State:
    """Train from the last checkpoint in `workdir`, or from the start, to the end; returns the final state.

    `launched` is the `time.monotonic()` at which the command began, for the time to the first step. `train_steps` are
    the `programs` of a run that this one shares them with. `params` are what the first step starts from, by default
    random. `begin` is called with the step that training starts from, before anything else is written. Raises Stopped
    after SIGINT or SIGTERM, and NonFiniteLoss.
    """
    length, batch_size = config.training.length, config.training.batch_size
    schedule = Schedule.of(config, pipeline.epoch_tokens(dataset.splits["train"], length))
    optimizer = optimizers.build(config.optimizer, total_steps=schedule.total, warmup_steps=schedule.warmup)
    K = schedule.most_per_dispatch
    train_steps = train_steps or programs(config, dataset, mesh)
    state = initial_state(config, optimizer, mesh)
    if params is not None:
        state["params"] = jax.device_put(params, sharding.placement(state, mesh)["params"])
    checkpoints = Checkpoints(workdir / "checkpoints", config.training.keep_last)
    restored = checkpoints.restore(state)
    if restored is not None:
        state = restored[0]
    start = check_step(int(state["step"]), schedule.total, workdir / "checkpoints")
    begin(start)

    def batches_after(step: int, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
        return pipeline.training_batches(
            dataset.splits["train"],
            length=length,
            batch_size=batch_size,
            seed=config.seed,
            start_step=step,
            rows=rows,
        )

    batches = batches_after(start, sharding.own_rows(batch_size, mesh))
    profiled = range(start + UNPROFILED, start + UNPROFILED + schedule.profile)

    def read(count: int) -> jax.Array:
        """The next batches on the devices, as one array [K, B, N] whose rest is never looked at."""
        rows = np.stack(list(itertools.islice(batches, count)))
        return sharding.shard_rows(np.resize(rows, (K, *rows.shape[1:])), mesh, axis=1, count=batch_size)

    with (
        contextlib.closing(checkpoints),
        jax.set_mesh(mesh),
        RunLogger(workdir, start, schedule.total) as logger,
        stop_signals() as stop,
        contextlib.ExitStack() as trace,
    ):
        peak = flops.peak(mesh.devices.flat[0].device_kind, mesh.size)
        clock = _Clock(batch_size * length, flops.per_token(config), peak)

        def record(first: int, last: int, metrics: dict[str, jax.Array]) -> None:
            """Look at the metrics of a dispatch, once the one after it is under way."""
            found = jax.device_get(metrics)
            finite = found["finite"][: last + 1 - first]
            if not finite.all():
                i = int(finite.argmin())
                loss, norm = (float(found[name][i]) for name in ("loss", "gradient_norm"))
                if hosts.is_leader():
                    with replacing(workdir / "nonfinite.npz") as file:
                        np.savez(file, step=first + i, tokens=next(batches_after(first + i - 1)))
                kept = f"stopped before that step, whose batch is in {workdir / 'nonfinite.npz'}"
                raise NonFiniteLoss(f"loss {loss}, gradient norm {norm} at step {first + i}; {kept}")
            if last % schedule.log_every == 0 or last in (1, schedule.total):
                values = {name: float(value[last - first]) for name, value in found.items() if name != "finite"}
                values |= clock.read(last)
                logger.trained(last, last * batch_size * length, values)

        pending: tuple[int, int, dict[str, jax.Array]] | None = None
        step = start
        while step < schedule.total:
            dropped = step >= schedule.total - schedule.drope
            first, step = step + 1, schedule.dispatch_end(step, start + 1, profiled.start, profiled.stop)
            count = step + 1 - first
            compiling = first in (start + 1, schedule.total - schedule.drope + 1)
            if compiling and pending is not None:
                record(*pending)
                pending = None
            stopped_by = stop.agreed(mesh)
            state, metrics = train_steps(dropped)(state, read(count), count)
            if compiling:
                jax.block_until_ready(metrics)
                clock.start(step)
            if first == start + 1:
                logger.message(f"first step done {time.monotonic() - launched:.1f} s after launch")
            if pending is not None:
                record(*pending)
            pending = first, step, metrics
            last, stopping = step == schedule.total, stopped_by()
            validating = step % schedule.validate_every == 0 or last
            saving = step % schedule.checkpoint_every == 0 or last or stopping > 0
            if validating or saving:
                record(*pending)
                pending = None
                with clock.paused():
                    if validating:
                        values = validate(state["params"], state["constants"], dropped)
                        logger.validated(step, values)
                    if saving:
                        checkpoints.save(step, state, {"step": step})
            if step in (profiled.start, profiled.stop):
                jax.block_until_ready(state)
                trace.close()
                if step in profiled and hosts.is_leader():
                    trace.enter_context(jax.profiler.trace(str(workdir / "profile")))
            if stopping:
                checkpoints.wait()
                raise Stopped(stopping, step)
    return state


class _Clock:
    """Speed between two readings, without the time spent on validation and checkpoints."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float | None):
        self._tokens_per_step, self._flops_per_token, self._peak = tokens_per_step, flops_per_token, peak_flops
        self.start(0)

    def start(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()

    def read(self, step: int) -> dict[str, float]:
        """Speed since the last reading; empty if no step has passed since."""
        steps, seconds = step - self._step, time.monotonic() - self._time
        if steps <= 0:
            return {}
        self.start(step)
        tokens_per_second = steps * self._tokens_per_step / seconds
        flops_per_second = tokens_per_second * self._flops_per_token
        values = {"step_seconds": seconds / steps, "tokens_per_second": tokens_per_second}
        values["flops_per_second"] = flops_per_second
        return values if self._peak is None else values | {"mfu": flops_per_second / self._peak}

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._time += time.monotonic() - begun
