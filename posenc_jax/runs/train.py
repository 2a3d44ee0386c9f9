"""The training loop of a stack of runs: train steps, logs, validation, checkpoints, and stopping on a signal."""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posenc_jax.config import RunConfig
from posenc_jax.distributed import hosts
from posenc_jax.files import atomic_write
from posenc_jax.reporting.metrics_log import MetricsLog
from posenc_jax.reporting.progress import Progress
from posenc_jax.reporting.tensorboard import TensorBoard
from posenc_jax.reporting.weights_and_biases import Board, WeightsAndBiases
from posenc_jax.runs.program import Stack
from posenc_jax.training import flops
from posenc_jax.training.checkpoint import Checkpoints, check_step
from posenc_jax.training.step import State

UNPROFILED = 5  # steps of a process before those that are profiled


class NonFiniteLoss(Exception):
    """The loss or its gradient is not finite. The last checkpoint, which is finite, is kept."""

    exit_code = 3


class Stopped(Exception):
    """A signal stopped the run after it had saved what it computed. `when` is "at step 5" or "during evaluation"."""

    def __init__(self, number: int, when: str):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} {when}, saved; the same command continues from there")
        self.exit_code = 128 + number


def train(
    stack: Stack,
    runs: Mapping[Path, RunConfig],
    folder: Path,
    *,
    launched: float,
    initial: Callable[[], dict[str, Any]] | None = None,
    on_start: Callable[[int], None] = lambda step: None,
) -> State:
    """Train runs from their last checkpoint, or from the start, to the end. Returns the final state of the stack.

    A stack of one raises NonFiniteLoss. In a larger stack, a run whose loss is not finite keeps its last finite state
    while the others continue; when it is then trained alone, it continues from there and raises. Each run of a larger
    stack ends with a checkpoint in its own workdir.

    Args:
      runs: settings of each run, by workdir; at most `stack.size`.
      folder: the folder of checkpoints, which is in the workdir for a stack of one.
      launched: the `time.monotonic()` at which the command began, for the time to the first step.
      initial: returns the entries of the initial state that are not random, for a stack of one: "params" and perhaps
        "constants". It is not called if a checkpoint is restored.
      on_start: called with the number of steps taken so far, before anything else is written.

    Raises Stopped after SIGINT or SIGTERM, CheckpointError, SaveError and NonFiniteLoss.
    """
    configs, schedule = list(runs.values()), stack.program.schedule
    checkpoints = Checkpoints(folder, configs[0].training.keep_last)
    states, start = stack.initial_states(configs), 0
    restored = checkpoints.restore(states)
    if restored is not None:
        states, start = restored[0], check_step(restored[1].get("step"), schedule.total, folder)
    elif initial is not None:
        states = states | initial()
    on_start(start)
    read = stack.reader([config.seed for config in configs], start)
    profiled = range(start + UNPROFILED, start + UNPROFILED + schedule.profile)
    with (
        contextlib.closing(checkpoints),
        jax.set_mesh(stack.mesh),
        _Recorder(stack, runs, start) as recorder,
        stop_signals() as stop,
        contextlib.ExitStack() as trace,
    ):
        step = start
        while step < schedule.total:
            dropped = step >= schedule.total - schedule.drope
            first, step = step + 1, schedule.dispatch_end(step, start + 1, profiled.start, profiled.stop)
            compiling = first in (start + 1, schedule.total - schedule.drope + 1)
            if compiling:
                recorder.catch_up()
            stopped_by, count = stop.agreed(stack.mesh), step + 1 - first
            states, metrics = stack.train_steps(dropped)(states, read(count), count)
            if compiling:
                jax.block_until_ready(metrics)
                recorder.clock.start(step)
            if first == start + 1:
                recorder.message(f"first step done {time.monotonic() - launched:.1f} s after launch")
            recorder.dispatched(first, step, metrics)
            last, stopping = step == schedule.total, stopped_by()
            validating = step % schedule.validate_every == 0 or last
            saving = step % schedule.checkpoint_every == 0 or last or stopping > 0
            if validating or saving:
                recorder.catch_up()
                with recorder.clock.paused():
                    if validating:
                        recorder.validate(step, states, dropped)
                    if saving:
                        checkpoints.save(step, states, {"step": step})
            if step in (profiled.start, profiled.stop):
                jax.block_until_ready(states)
                trace.close()
                if step in profiled and hosts.is_leader():
                    trace.enter_context(jax.profiler.trace(str(next(iter(runs)) / "profile")))
            if stopping:
                checkpoints.wait()
                raise Stopped(stopping, f"at step {step}")
    if stack.size > 1:
        for workdir, state in zip(runs, stack.split(states), strict=False):
            _save_alone(workdir, state)
    return states


def _save_alone(workdir: Path, state: State) -> None:
    """Save the final checkpoint of one run of a stack in its own workdir."""
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep_last=2)) as checkpoints:
        if checkpoints.restore(state) is None:
            step = int(state["step"])
            checkpoints.save(step, state, {"step": step})


class _Recorder(contextlib.ExitStack):
    """Logs and validates each run. It reads the metrics of a dispatch while the next dispatch runs."""

    def __init__(self, stack: Stack, runs: Mapping[Path, RunConfig], start: int):
        super().__init__()
        self._stack, self._runs, self._schedule = stack, runs, stack.program.schedule
        self._finite = [True] * len(runs)
        self._pending: tuple[int, int, dict[str, jax.Array]] | None = None
        config, mesh = stack.program.config, stack.mesh
        self._tokens = config.training.batch_size * config.training.length  # per step
        project = config.logging.wandb if start < self._schedule.total else ""
        self._loggers = [self.enter_context(RunLogger(workdir, start, project)) for workdir in runs]
        self._progress = self.enter_context(Progress(self._schedule.total, start_step=start))
        self.message = self._progress.message
        for place in filter(None, (logger.place for logger in self._loggers)):
            self.message(f"Weights & Biases: {place}")
        peak = flops.peak(mesh.devices.flat[0].device_kind, mesh.size)
        share = None if peak is None else peak / stack.size
        self.clock = _Clock(self._tokens, flops.per_token(config), share)

    def dispatched(self, first: int, last: int, metrics: dict[str, jax.Array]) -> None:
        """Keep the metrics of a dispatch of steps `first` to `last`, and read those of the one before."""
        self.catch_up()
        self._pending = first, last, metrics

    def catch_up(self) -> None:
        """Read the metrics that are kept. Raises NonFiniteLoss for a stack of one."""
        if self._pending is None:
            return
        first, last, metrics = self._pending
        self._pending = None
        found = jax.device_get(metrics)
        logged = last % self._schedule.log_every == 0 or last in (1, self._schedule.total)
        speed = self.clock.read(last) if logged else {}
        for i, logger in enumerate(self._loggers):
            own = found if self._stack.size == 1 else {name: values[i] for name, values in found.items()}
            finite = own["finite"][: last + 1 - first]
            self._finite[i] = bool(finite.all())
            if not self._finite[i]:
                if self._stack.size == 1:
                    raise self._non_finite(first, int(finite.argmin()), own)
            elif logged:
                values = {name: float(of_step[last - first]) for name, of_step in own.items() if name != "finite"}
                logger.trained(last, last * self._tokens, values | speed)
                if i == self._finite.index(True):  # one run is shown
                    self._progress.update(last, values | speed)

    def validate(self, step: int, states: State, dropped: bool) -> None:
        """Validate the runs whose loss is finite."""
        program = self._stack.program
        runs = zip(self._runs.items(), self._loggers, self._finite, self._stack.models(states), strict=False)
        for (workdir, config), logger, finite, (params, constants) in runs:
            if finite:
                values = program.validate(config, params, constants, dropped)
                logger.validated(step, values)
                own = "" if self._stack.size == 1 else f"{workdir.name}  "
                self.message(f"step {step}  {own}{program.data.headline(values)}")
                if sample := program.sample(config, params, constants, dropped):
                    logger.sampled(step, sample)
                    self.message(f"step {step}  {own}sample {sample!r}")

    def _non_finite(self, first: int, i: int, metrics: dict[str, np.ndarray]) -> NonFiniteLoss:
        """Save the batch of a step whose loss is not finite, and return the exception."""
        ((workdir, config),) = self._runs.items()
        if hosts.is_leader():
            batch = next(self._stack.program.data.batches(config.seed, first + i - 1))
            with atomic_write(workdir / "nonfinite.npz") as file:
                np.savez(file, step=first + i, tokens=batch)
        loss, norm = (float(metrics[name][i]) for name in ("loss", "gradient_norm"))
        kept = f"stopped before that step, whose batch is in {workdir / 'nonfinite.npz'}"
        return NonFiniteLoss(f"loss {loss}, gradient norm {norm} at step {first + i}; {kept}")


class RunLogger(contextlib.ExitStack):
    """Logs the steps of a run after `start_step`. Only process 0 writes.

    They are logged in metrics.jsonl, in TensorBoard and, if it has a `project`, in Weights & Biases. `place` says where
    the latter is.
    """

    def __init__(self, workdir: Path, start_step: int, project: str = ""):
        super().__init__()
        self._log, self.place = None, ""
        self._boards: list[Board] = []
        if hosts.is_leader():
            self._log = self.enter_context(MetricsLog(workdir / "metrics.jsonl", start_step))
            self._boards.append(self.enter_context(TensorBoard(workdir / "tensorboard", purge_step=start_step + 1)))
            if project:
                # A killed process may have sent less than it has logged: the last logged step is sent again.
                board = self.enter_context(WeightsAndBiases(workdir, project, self._log.last_step))
                self._boards.append(board)
                self.place = board.place

    def trained(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step, and the number of tokens trained on so far."""
        self._write({"step": step, "tokens": tokens, **values}, {f"train/{name}": x for name, x in values.items()})

    def validated(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the validation metrics and the statistics of attention. TensorBoard sorts the groups by name."""
        groups = {"validation_": "validation/", "attention_": "validation_attention/"}
        tags = {name: next(name.replace(*group) for group in groups.items() if group[0] in name) for name in values}
        self._write({"step": step, **values}, {tags[name]: x for name, x in values.items()})

    def sampled(self, step: int, text: str) -> None:
        """Log the text that the model generates."""
        for board in self._boards:
            board.plain_text("validation/sample", text, step)
            board.flush()

    def _write(self, entry: dict[str, Any], scalars: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(entry)
        for board in self._boards:
            board.scalars(entry["step"], scalars)
            board.flush()  # a killed process then leaves the same steps in all logs


class _Clock:
    """Speed between two readings, without the time of validation and checkpoints."""

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
        speed = steps * self._tokens_per_step / seconds
        speed_flops = speed * self._flops_per_token
        values = {"step_seconds": seconds / steps, "tokens_per_second": speed, "flops_per_second": speed_flops}
        return values if self._peak is None else values | {"mfu": speed_flops / self._peak}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._time += time.monotonic() - begun


class Stop:
    """The number of the first signal that this process has received; 0 for none."""

    number = 0

    def agreed(self, mesh: Mesh) -> Callable[[], int]:
        """A function that returns the number of the signal to stop on, or 0; it is equal in all processes of a mesh.

        It returns the signal that any process had received when `agreed` was called. The devices compute the answer
        after the work that was dispatched before. Reading it later makes no device wait.
        """
        if not mesh.is_multi_process:
            return lambda: self.number
        everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        own = jax.make_array_from_callback((mesh.size,), everywhere, lambda _: np.full(1, self.number, np.int32))
        largest = _largest(mesh)(own)
        return lambda: int(largest)


@functools.cache
def _largest(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Record the first SIGINT or SIGTERM. A second signal ends the process at once."""
    stop = Stop()

    def handle(number: int, _: Any) -> None:
        if stop.number:
            os._exit(128 + number)
        stop.number = number

    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
