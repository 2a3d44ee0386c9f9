"""The training loop: compiles the step, feeds it, logs, validates, checkpoints, and stops when told to."""

import contextlib
import functools
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from posenc_jax.config import RunConfig
from posenc_jax.data import pipeline
from posenc_jax.data.tokens import Dataset
from posenc_jax.reporting.progress import Progress
from posenc_jax.reporting.tensorboard import TensorBoard
from posenc_jax.schema import ConfigError
from posenc_jax.training import flops, sharding
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.checkpoint import Checkpoints
from posenc_jax.training.step import State, TrainSteps, abstract_model, initial_state, make_train_step, repeated

UNPROFILED = 5  # steps of a process before those it traces

# (params, constants, whether the encoding is dropped) ->
#     {"validation_loss": nats per token, "validation_bits_per_byte": bits}, and what is to be logged beside them:
#     a number, or one for each layer
Validate = Callable[[Any, Any, bool], dict[str, Any]]


class NonFiniteLoss(Exception):
    """The loss or its gradient is not finite; the last checkpoint, which is finite, is kept."""

    exit_code = 3


class Stopped(Exception):
    """A signal asked the run to stop, which it did after saving."""

    def __init__(self, number: int, step: int):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} at step {step}, saved; the same command continues from there")
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Schedule:
    """Durations of a run in whole steps."""

    total: int
    warmup: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    drop_encoding: int
    profile: int

    @classmethod
    def of(cls, config: RunConfig, tokens_per_epoch: int) -> "Schedule":
        """Raises ConfigError for more steps than can be counted."""
        training = config.training

        def steps(name: str) -> int:
            duration, tokens_per_step = getattr(training, name), training.batch_size * training.length
            count = duration.steps(tokens_per_step=tokens_per_step, tokens_per_epoch=tokens_per_epoch)
            if count >= 2**31:
                raise ConfigError(f"config.training.{name}", duration.plain(), f"must be below 2^31 steps, not {count}")
            return count

        return cls(
            steps("duration"),
            steps("warmup"),
            steps("log_every"),
            steps("validate_every"),
            steps("checkpoint_every"),
            steps("drop_encoding"),
            steps("profile"),
        )

    def dispatch_end(self, step: int, most: int, *stops: int) -> int:
        """The last step of the dispatch after `step`: at most so many on, and none past one where there is more to do.

        That is a step which is logged, validated, saved or the last one with the encoding, or one of `stops`.
        """
        every = (self.log_every, self.validate_every, self.checkpoint_every)
        stops = (*stops, self.total, self.total - self.drop_encoding)
        return min(step + most, *(step - step % n + n for n in every), *(stop for stop in stops if stop > step))


Programs = Callable[[bool], TrainSteps]  # whether the encoding is dropped -> the steps to take


def programs(config: RunConfig, dataset: Dataset, mesh: Mesh) -> Programs:
    """The compiled steps of a run, which serve all runs that can be members of one program with it."""
    schedule = Schedule.of(config, pipeline.epoch_tokens(dataset.splits["train"], config.training.length))
    optimizer = optimizers.build(config.optimizer, total_steps=schedule.total, warmup_steps=schedule.warmup)
    token_bytes = jnp.asarray(dataset.tokenizer.token_bytes)
    placed = sharding.placement(jax.eval_shape(lambda: initial_state(config, optimizer)), mesh)

    @functools.cache
    def train_steps(dropped: bool) -> TrainSteps:
        graphdef, _ = abstract_model(config, dropped=dropped)
        train_step = make_train_step(config, graphdef, optimizer, token_bytes)
        return jax.jit(repeated(train_step), donate_argnums=0, out_shardings=(placed, None))

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
) -> State:
    """Train from the last checkpoint in `workdir`, or from the start, to the end; returns the final state.

    `launched` is the `time.monotonic()` at which the command began, for the time to the first step. `train_steps` are
    the `programs` of a run that this one shares them with. `params` are what the first step starts from, by default
    random. Raises Stopped after SIGINT or SIGTERM, and NonFiniteLoss.
    """
    length, batch_size = config.training.length, config.training.batch_size
    schedule = Schedule.of(config, pipeline.epoch_tokens(dataset.splits["train"], length))
    optimizer = optimizers.build(config.optimizer, total_steps=schedule.total, warmup_steps=schedule.warmup)
    K = config.training.steps_per_dispatch
    train_steps = train_steps or programs(config, dataset, mesh)
    state = initial_state(config, optimizer, mesh)
    if params is not None:
        state["params"] = jax.device_put(params, sharding.placement(state, mesh)["params"])
    checkpoints = Checkpoints(workdir / "checkpoints", config.training.keep_last)
    restored = checkpoints.restore(state)
    validation_loss = float("inf")
    if restored is not None:
        state, validation_loss = restored[0], restored[1]["validation_loss"]
    start = int(state["step"])

    def batches_after(step: int) -> Iterator[np.ndarray]:
        return pipeline.training_batches(
            dataset.splits["train"],
            length=length,
            batch_size=batch_size,
            seed=config.seed,
            start_step=step,
            shard=(jax.process_index(), jax.process_count()),
        )

    batches = batches_after(start)
    profiled = range(start + UNPROFILED, start + UNPROFILED + schedule.profile)

    def read(count: int) -> jax.Array:
        """The next batches on the devices, as one array [K, B, N] whose rest is never looked at."""
        rows = np.stack(list(itertools.islice(batches, count)))
        return sharding.shard_rows(np.resize(rows, (K, *rows.shape[1:])), mesh, axis=1)

    with (
        contextlib.closing(checkpoints),
        jax.set_mesh(mesh),
        MetricsLog(workdir / "metrics.jsonl", start) as log,
        TensorBoard(workdir / "tensorboard", purge_step=start + 1) as tensorboard,
        Progress(schedule.total, start_step=start) as progress,
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
                np.savez(workdir / "nonfinite.npz", step=first + i, tokens=next(batches_after(first + i - 1)))
                kept = f"stopped before that step, whose batch is in {workdir / 'nonfinite.npz'}"
                raise NonFiniteLoss(f"loss {loss}, gradient norm {norm} at step {first + i}; {kept}")
            if last % schedule.log_every == 0 or last in (1, schedule.total):
                values = {name: float(value[last - first]) for name, value in found.items() if name != "finite"}
                values |= clock.read(last)
                log.write({"step": last, "tokens": last * batch_size * length, **values})
                tensorboard.scalars(last, {f"train/{name}": value for name, value in values.items()})
                progress.update(last, values)

        def save(step: int, state: State) -> None:
            checkpoints.save(step, state, {"step": step, "validation_loss": validation_loss}, validation_loss)

        pending: tuple[int, int, dict[str, jax.Array]] | None = None
        step = start
        while step < schedule.total:
            dropped = step >= schedule.total - schedule.drop_encoding
            first, step = step + 1, schedule.dispatch_end(step, K, start + 1, profiled.start, profiled.stop)
            count = step + 1 - first
            compiling = first in (start + 1, schedule.total - schedule.drop_encoding + 1)
            if compiling and pending is not None:
                record(*pending)
                pending = None
            state, metrics = train_steps(dropped)(state, read(count), count)
            if compiling:
                jax.block_until_ready(metrics)
                clock.start(step)
            if first == start + 1:
                progress.message(f"first step done {time.monotonic() - launched:.1f} s after launch")
            if pending is not None:
                record(*pending)
            pending = first, step, metrics
            last, stopping = step == schedule.total, stop.is_set()
            validating = step % schedule.validate_every == 0 or last
            saving = step % schedule.checkpoint_every == 0 or last or stopping
            if validating or saving:
                record(*pending)
                pending = None
                with clock.paused():
                    if validating:
                        values = validate(state["params"], state["constants"], dropped)
                        validation_loss = values["validation_loss"]
                        log.write({"step": step, **values})
                        tensorboard.scalars(step, {name.replace("_", "/", 1): value for name, value in values.items()})
                        progress.message(
                            f"step {step}  validation {values['validation_bits_per_byte']:.4f} bits per byte"
                        )
                    if saving:
                        save(step, state)
            if step in (profiled.start, profiled.stop):
                jax.block_until_ready(state)
                trace.close()
                if step in profiled:
                    trace.enter_context(jax.profiler.trace(str(workdir / "profile")))
            if stopping:
                checkpoints.wait()
                raise Stopped(stop.number, step)
    return state


class MetricsLog:
    """metrics.jsonl, one JSON object per line; a resumed run drops the lines after the step it resumes from."""

    def __init__(self, path: Path, resume_step: int):
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line + "\n")
                except ValueError:
                    break  # the process died while it wrote this line
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


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


class _StopEvent(threading.Event):
    number = 0


@contextmanager
def stop_signals() -> Iterator[_StopEvent]:
    """An event that the first SIGINT or SIGTERM sets; a second one ends the process at once."""
    stop = _StopEvent()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.number = number
        stop.set()

    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
