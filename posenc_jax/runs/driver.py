"""The driver: trains, evaluates and finishes runs, alone or in stacks. Runs share programs where they can."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from posenc_jax.config import RunConfig
from posenc_jax.data import cache, tokens
from posenc_jax.distributed import hosts, sharding
from posenc_jax.evaluation import precision
from posenc_jax.evaluation.score_cache import ScoreCache
from posenc_jax.evaluation.window_sums import WindowSums
from posenc_jax.files import sha256_of
from posenc_jax.reporting import weights_and_biases
from posenc_jax.runs import finish, sources, trained
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.grid import RunSpec
from posenc_jax.runs.program import Program, program_key
from posenc_jax.runs.text_data import TextData
from posenc_jax.runs.train import RunLogger, Stopped, stop_signals, train
from posenc_jax.runs.workdir import WorkdirError
from posenc_jax.schema import plain
from posenc_jax.training import checkpoint
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.schedule import Schedule
from posenc_jax.training.step import initial_constants

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "posenc-jax")
SAME_BITS = ("versions", "device", "git_revision")  # kept losses are used only if these are equal


def prepare(config: RunConfig) -> Program:
    """Prepare data and devices, and trace the program of a run. Raises ConfigError if the run cannot work."""
    training = config.training
    if config.logging.wandb:
        hosts.on_leader(lambda: weights_and_biases.check(config.logging.wandb))
    sharding.divide_cpu(training.cpu_devices, training.batch_size // training.grad_accum_steps)
    cache.keep_compiled_programs(config.data.cache_path / "compiled")
    if config.task.name:
        program = Program(config)
        program.trace()
        return program
    made: list[tokens.Dataset] = []  # process 0 prepares the text; the others find it in the cache
    hosts.on_leader(lambda: made.append(sources.prepare_text(config)))
    dataset = made[0] if made else sources.prepare_text(config)
    hosts.check_same({"the fingerprint of the text": dataset.fingerprint})
    program = Program(config, dataset)
    program.trace()
    return program


class Driver:
    """Completes runs. `folder` maps a run specification to its workdir."""

    def __init__(self, folder: Callable[[RunSpec], Path]):
        self.folder = folder
        self._programs: list[Program] = []
        self._started = datetime.now(UTC).isoformat()

    def complete(self, spec: RunSpec, *, launched: float) -> None:
        """Train, evaluate and report a run, after the run that it continues. Finished parts are skipped.

        Raises ConfigError, WorkdirError, and what `train` raises.
        """
        config, workdir, parent = spec.config, self.folder(spec), spec.parent
        if hosts.on_leader(lambda: finish.is_complete_after_repair(config, workdir)):
            return
        if parent:
            self.complete(parent, launched=launched)
        program, source = self.program(config), sources.of_run(config)
        if parent:
            source = sources.open_run(self.folder(parent).name, self.folder(parent))
        made_with = provenance(program, self._started) | ({"initial_weights": source.record} if source else {})
        check = functools.partial(check_duration, workdir, config, program.schedule)
        with workdirs.claim(workdir, config, made_with, check):
            precision.warn(config)
            runs, folder = {workdir: config}, workdir / "checkpoints"
            on_start = functools.partial(_record_session, runs, made_with, program)
            initial = functools.partial(source.load, config, program.mesh) if source else None
            if initial and config.evaluates_only:
                on_start(0)
                with RunLogger(workdir, 0):  # an empty log
                    state = {"constants": initial_constants(config, program.mesh)} | initial()
            else:
                state = train(program.single, runs, folder, launched=launched, initial=initial, on_start=on_start)
            params, constants = state["params"], state["constants"]
            measured = _measure(program, config, workdir, params, constants, made_with)
            documents, total = program.data.documents, program.schedule.total
            hosts.on_leader(lambda: finish.finish_run(config, workdir, measured, documents, constants, total))

    def train_stack(self, specs: Sequence[RunSpec], folder: Path, *, launched: float) -> None:
        """Train runs of one program at the same time, as many as fit. `complete` then only evaluates them.

        Checkpoints of stacks are saved in `folder`. They may not fit other devices or other memory. Complete runs are
        left out. So are runs that have their own checkpoints, unless a stack of the same runs was begun before.
        """
        specs = [s for s in specs if not (self.folder(s) / workdirs.COMPLETE).exists()]
        if not self._checkpoints(specs, folder).exists():
            specs = [s for s in specs if not any(self.folder(s).glob(f"checkpoints/step_*/{checkpoint.MANIFEST}"))]
        if len(specs) < 2:
            return
        program = self.program(specs[0].config)
        stack, made_with = program.stack(len(specs)), provenance(program, self._started)
        for start in range(0, len(specs), stack.size) if stack.size > 1 else ():
            runs = {self.folder(spec): spec.config for spec in specs[start : start + stack.size]}
            with contextlib.ExitStack() as claims:
                for workdir, config in runs.items():
                    claims.enter_context(workdirs.claim(workdir, config, made_with))
                on_start = functools.partial(_record_session, runs, made_with, program)
                saved = self._checkpoints(specs, folder) / f"from_{start}"
                train(stack, runs, saved, launched=launched, on_start=on_start)

    def program(self, config: RunConfig) -> Program:
        """The program of a run, prepared once. The first run needs no `program_key`, which traces the model."""
        for program in self._programs:
            if program_key(program.config) == program_key(config):
                return program
        self._programs.append(prepare(config))
        return self._programs[-1]

    def _checkpoints(self, specs: Sequence[RunSpec], folder: Path) -> Path:
        """The folder of the checkpoints of a stack of these runs. Another set of runs has another folder."""
        return folder / f"stack-{sha256_of([spec.name for spec in specs])[:12]}"


def _measure(
    program: Program, config: RunConfig, workdir: Path, params: Any, constants: Any, made_with: Mapping[str, Any]
) -> WindowSums:
    """The measurements of a trained model. A single process keeps the losses of finished batches in scores/.

    Raises Stopped after SIGINT or SIGTERM, at the end of a batch. With several processes, a signal ends the process at
    once.
    """
    if hosts.count() > 1:
        return program.measure(config, params, constants)
    saved = None if config.evaluates_only else checkpoint.checksum(workdir / "checkpoints", program.schedule.total)
    identity = sha256_of([saved or config.init_sha256, *(made_with[name] for name in SAME_BITS)])
    with stop_signals() as stop:

        def check_signals() -> None:
            if stop.number:
                raise Stopped(stop.number, "during evaluation")

        cache = ScoreCache(program.final_scorer, workdir / "scores", identity, after_batch=check_signals)
        measured = program.measure(config, params, constants, cache)
        check_signals()
    return measured


def _record_session(runs: Mapping[Path, RunConfig], made_with: dict[str, Any], program: Program, step: int) -> None:
    """Record in config.json the step at which the runs start, and any jump of the learning rate there."""

    def record() -> None:
        for workdir, config in runs.items():
            facts: dict[str, Any] = {"step": step, "total_steps": program.schedule.total}
            if rates := rate_jump(workdirs.read(workdir), config, program.schedule, step):
                facts["learning_rates"] = rates
            workdirs.record_session(workdir, config, made_with, facts)
            if isinstance(program.data, TextData):
                trained.save_tokenizer(workdir, program.data.dataset.tokenizer)

    hosts.on_leader(record)


def provenance(program: Program, started: str) -> dict[str, Any]:
    """Time of the start, command, versions, devices, git revision, data and windows of the runs of a program."""
    devices = jax.devices()
    place = [f"{hosts.count()} processes"] if hosts.count() > 1 else []
    place += [f"{os.cpu_count()} cores", platform.machine()]
    return {
        "started": started,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": f"{devices[0].device_kind} x{len(devices)} ({', '.join(place)})",
        "git_revision": _git_revision(),
        "parameters": program.parameters,
        **program.data.record(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the code, with "+changes" if files differ from it; None where git does not track the code."""
    code = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(code.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", code.name)  # not so of a package that is installed inside another checkout
        return git("describe", "--always", "--abbrev=12", "--dirty=+changes")
    except (OSError, subprocess.SubprocessError):
        return None


def check_duration(workdir: Path, config: RunConfig, schedule: Schedule) -> None:
    """Raise WorkdirError if the run in the folder may not continue to the end of this schedule.

    It may continue if both schedules agree up to its last checkpoint, or if `training.allow_schedule_change` is set.
    They agree during the warm-up, before the decay of "wsd", and at a constant learning rate. The run may not continue
    if it was trained beyond the end of the new schedule.
    """
    record = workdirs.read(workdir)
    if not _changes(record, schedule):
        return
    checkpoints = workdir / "checkpoints"
    try:
        step = checkpoint.newest_intact(checkpoints) or 0
    except checkpoint.CheckpointError:  # the restore moves damaged checkpoints aside, and raises this
        return
    old, new = record["config"]["training"]["duration"], plain(config.training.duration)
    trained = f"workdir {workdir} was trained to step {step} with training.duration = {old!r}"
    if schedule.total < step:
        raise WorkdirError(f"{trained}, and {new!r} ends before it, at step {schedule.total}; choose another workdir")
    rates = rate_jump(record, config, schedule, step)
    if rates and not config.training.allow_schedule_change:
        jump = f"{trained}, and with {new!r} the learning rate would jump from {rates[0]:.3g} to {rates[1]:.3g}"
        remedy = "choose another workdir, or set config.training.allow_schedule_change=True to go on"
        earlier = [s for s in checkpoint.steps(checkpoints) if s < step and not rate_jump(record, config, schedule, s)]
        if earlier:
            remedy += f", or move the checkpoints after step {earlier[-1]} away to go on from there without a jump"
        raise WorkdirError(f"{jump}; {remedy}")


def rate_jump(record: dict[str, Any], config: RunConfig, schedule: Schedule, step: int) -> tuple[float, float] | None:
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


def _changes(record: dict[str, Any], schedule: Schedule) -> bool:
    """Whether the schedule differs from that of the last session."""
    return bool(record["sessions"]) and record["sessions"][-1]["total_steps"] != schedule.total


def _course(config: RunConfig, schedule: Schedule, total: int, step: int) -> Float[np.ndarray, "steps 2"]:
    """The learning rate, and whether the encoding is dropped, for each step up to `step` + 1."""
    steps = {"total_steps": total, "warmup_steps": schedule.warmup, "decay_steps": schedule.decay}
    share = optimizers.relative_rate(config.optimizer, **steps)
    taken = np.arange(step + 1)
    rates = config.optimizer.learning_rate * np.asarray(share(jnp.asarray(taken)))
    return np.stack([rates, taken >= total - schedule.drope], axis=1)
