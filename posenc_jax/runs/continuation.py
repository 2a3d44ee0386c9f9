"""Whether a trained run may continue with another duration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from posenc_jax.config import RunConfig
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.workdir import WorkdirError
from posenc_jax.schema import plain
from posenc_jax.training import manifest
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.schedule import Schedule


def check_duration(workdir: Path, config: RunConfig, schedule: Schedule) -> None:
    """Raise WorkdirError if the run in the folder may not continue to the end of this schedule.

    It may continue if both schedules agree up to its last checkpoint, for example during the warm-up, or if
    `training.allow_schedule_change` is set. It may not if it was trained beyond the end of the new schedule.
    """
    record = workdirs.read(workdir)
    if not _changes(record, schedule):
        return
    try:
        step = manifest.newest_intact(workdir / "checkpoints") or 0
    except manifest.CheckpointError:  # the restore moves damaged checkpoints aside, and raises this
        return
    old, new = record["config"]["training"]["duration"], plain(config.training.duration)
    trained = f"workdir {workdir} was trained to step {step} with training.duration = {old!r}"
    if schedule.total < step:
        raise WorkdirError(f"{trained}, and {new!r} ends before it, at step {schedule.total}; choose another workdir")
    rates = jump(record, config, schedule, step)
    if rates and not config.training.allow_schedule_change:
        raise WorkdirError(
            f"{trained}, and with {new!r} the learning rate would jump from {rates[0]:.3g} to {rates[1]:.3g}; choose "
            "another workdir, or set config.training.allow_schedule_change=True to go on"
        )


def jump(record: Mapping[str, Any], config: RunConfig, schedule: Schedule, step: int) -> tuple[float, float] | None:
    """The learning rate of `step` as it was trained, and that of the next step in the new schedule.

    None if the schedule has not changed since the last session. None also if a run with only this schedule would have
    had the same learning rate in each step so far, and the encoding in the same steps.
    """
    if not _changes(record, schedule):
        return None
    totals = np.full(step, schedule.total)
    for session in record["sessions"]:
        totals[session["step"] :] = session["total_steps"]
    straight = _course(config, schedule, schedule.total, step)
    trained = straight.copy()
    for total in set(totals.tolist()):
        trained[:-1][totals == total] = _course(config, schedule, total, step)[:-1][totals == total]
    if (trained == straight).all():
        return None
    return float(trained[-2, 0]), float(straight[-1, 0])


def _changes(record: Mapping[str, Any], schedule: Schedule) -> bool:
    """Whether the schedule differs from that of the last session."""
    return bool(record["sessions"]) and record["sessions"][-1]["total_steps"] != schedule.total


def _course(config: RunConfig, schedule: Schedule, total: int, step: int) -> Float[np.ndarray, "steps 2"]:
    """The learning rate, and whether the encoding is dropped, for each step up to `step` + 1."""
    share = optimizers.schedule(config.optimizer, total_steps=total, warmup_steps=schedule.warmup)
    taken = np.arange(step + 1)
    rates = config.optimizer.learning_rate * np.asarray(share(jnp.asarray(taken)))
    return np.stack([rates, taken >= total - schedule.drope], axis=1)
