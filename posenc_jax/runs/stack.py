"""Runs of a study trained as members of one program, each left in its folder as if it had been trained alone.

What a member's folder then lacks are the validations along the way. The states of all members are saved together as
often as one run's would be, and training goes on from there.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from posenc_jax.config import RunConfig
from posenc_jax.data.tokens import Dataset
from posenc_jax.reporting.metrics_log import MetricsLog
from posenc_jax.reporting.progress import Progress
from posenc_jax.training.checkpoint import Checkpoints, check_step
from posenc_jax.runs.members import Program, fitting_program, parts
from posenc_jax.runs.stopping import Stopped, stop_signals


def train_stack(
    runs: Mapping[Path, RunConfig],
    dataset: Dataset,
    folder: Path,
    *,
    devices: Sequence[Any] | None = None,
    vectorized: bool | None = None,
    memory: int | None = None,
    begin: Callable[[Path, int], None] = lambda workdir, step: None,
) -> None:
    """Train runs that can be members of one program, to their last step or to their last finite one.

    Args:
      runs: by the folders that metrics.jsonl and a checkpoint are left in.
      dataset: what all of them read.
      folder: of the checkpoints of all, on the way. Another number of devices, or other memory, may not fit them.
      devices, vectorized, memory: as of `members.train_members`.
      begin: called with each folder and the step from which its run is trained, before it is.

    Raises Stopped after SIGINT or SIGTERM, CheckpointError and SaveError.
    """
    workdirs, configs = list(runs), list(runs.values())
    program, size = fitting_program(configs, dataset, devices=devices, vectorized=vectorized, memory=memory)
    for part, filled in parts(len(configs), size):
        own = [workdirs[i] for i in part]
        with contextlib.closing(Checkpoints(folder / f"members_{part.start}", keep_last=2)) as checkpoints:
            states = _train(program, [configs[i] for i in filled], own, checkpoints, begin)
        for place, workdir in enumerate(own):
            _leave(workdir, jax.tree.map(lambda of_all, i=place: of_all[i, ...], states))


def _train(
    program: Program,
    configs: Sequence[RunConfig],
    workdirs: Sequence[Path],
    checkpoints: Checkpoints,
    begin: Callable[[Path, int], None],
) -> Any:
    """The final states of the members, on the host."""
    schedule, training = program.schedule, configs[0].training
    states, step = program.initial_states(configs), 0
    restored = checkpoints.restore(states)
    if restored is not None:
        states, step = restored[0], check_step(restored[1].get("step"), schedule.total, workdirs[0])
    for workdir in workdirs:
        begin(workdir, step)
    with (
        contextlib.ExitStack() as stack,
        Progress(schedule.total, start_step=step) as progress,
        stop_signals() as stop,
    ):
        logs = [stack.enter_context(MetricsLog(workdir / "metrics.jsonl", step)) for workdir in workdirs]
        final = states
        for last, final, metrics in program.train(configs, states, step):
            if last % schedule.log_every == 0 or last == schedule.total:
                for i, log in enumerate(logs):
                    values = {name: float(value[i, -1]) for name, value in metrics.items() if name != "finite"}
                    if metrics["finite"][i, -1]:
                        log.write({"step": last, "tokens": last * training.batch_size * training.length, **values})
                progress.update(last, {name: float(metrics[name][0, -1]) for name in ("loss", "bits_per_byte")})
            stopping = stop.number  # read once: a signal may come at any moment
            if last % schedule.checkpoint_every == 0 or last == schedule.total or stopping:
                checkpoints.save(last, final, {"step": last})
            if stopping:
                checkpoints.wait()
                raise Stopped(stopping, last)
    return jax.device_get(final)


def _leave(workdir: Path, state: Any) -> None:
    """The checkpoint that the member's run would have ended with."""
    checkpoints = Checkpoints(workdir / "checkpoints", keep_last=2)
    if checkpoints.restore(state) is None:
        step = int(state["step"])
        checkpoints.save(step, state, {"step": step})
    checkpoints.close()
