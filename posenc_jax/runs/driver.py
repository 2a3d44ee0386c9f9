"""The driver: trains, evaluates and finishes runs, alone or in stacks. Runs share programs where they can."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posenc_jax.config import RunConfig
from posenc_jax.data import tokens
from posenc_jax.distributed import hosts, sharding
from posenc_jax.evaluation import precision
from posenc_jax.files import sha256_of
from posenc_jax.runs import compile_cache, continuation, finish, trained
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.grid import RunSpec
from posenc_jax.runs.program import Program, program_key
from posenc_jax.runs.provenance import record
from posenc_jax.runs.rehearsal import rehearse
from posenc_jax.runs.train import train
from posenc_jax.training.manifest import MANIFEST


def prepare(config: RunConfig) -> Program:
    """Prepare text and devices, and trace the program of a run. Nothing is compiled or written yet.

    Raises ConfigError if the run cannot work.
    """
    training = config.training
    sharding.divide_cpu(training.cpu_devices, training.batch_size // training.grad_accum_steps)
    compile_cache.keep_compiled_programs(config.data.cache_path / "compiled")
    made: list[tokens.Dataset] = []  # process 0 prepares the text; the others find it in the cache
    hosts.decided(lambda: made.append(tokens.prepare(config.data)))
    dataset = made[0] if made else tokens.prepare(config.data)
    hosts.check_same({"the fingerprint of the text": dataset.fingerprint})
    program = Program(config, dataset)
    rehearse(program, validation_windows=len(program.validation_windows), windows=len(program.windows.tokens))
    return program


class Driver:
    """Completes runs. `folder` maps a run specification to its workdir."""

    def __init__(self, folder: Callable[[RunSpec], Path]):
        self.folder = folder
        self._programs: list[Program] = []
        self._started = datetime.now(UTC).isoformat()

    def has_ended(self, spec: RunSpec) -> bool:
        """Whether a run is complete; see `finish.has_ended`."""
        return hosts.decided(functools.partial(finish.has_ended, spec.config, self.folder(spec)))

    def complete(self, spec: RunSpec, *, launched: float) -> None:
        """Train, evaluate and report a run, and first the run that it continues. Finished parts are skipped.

        Raises ConfigError, WorkdirError, and what `train` raises.
        """
        config, workdir, continued = spec.config, self.folder(spec), spec.parent
        if continued and not self.has_ended(continued):
            self.complete(continued, launched=launched)
        program = self.program(config)
        params = trained.load(self.folder(continued), program.mesh).params if continued else None
        made_with = record(program, self._started)
        if continued:
            made_with["started_from"] = self.folder(continued).name
        check = functools.partial(continuation.check_duration, workdir, config, program.schedule)
        with workdirs.claim(workdir, config, made_with, check):
            precision.warn(config)
            state = train(
                program.single,
                {workdir: config},
                workdir / "checkpoints",
                launched=launched,
                params=params,
                begin=lambda own, step: self._begin(own, config, made_with, program, step),
            )
            params, constants = state["params"], state["constants"]
            measured = program.window_sums(config, params, constants)
            documents, total = program.windows.documents, program.schedule.total
            hosts.decided(lambda: finish.finish_run(config, workdir, measured, documents, constants, total))

    def train_stack(self, specs: Sequence[RunSpec], folder: Path, *, launched: float) -> None:
        """Train runs of one program at the same time, as many as fit. `complete` then only evaluates them.

        Checkpoints of stacks are saved in `folder`. They may not fit other devices or other memory. Complete runs are
        left out. So are runs that have their own checkpoints, unless a stack of the same runs was begun before.
        """
        specs = [s for s in specs if not (self.folder(s) / workdirs.COMPLETE).exists()]
        if not self._checkpoints(specs, folder).exists():
            specs = [s for s in specs if not any(self.folder(s).glob(f"checkpoints/step_*/{MANIFEST}"))]
        if len(specs) < 2:
            return
        program = self.program(specs[0].config)
        stack, made_with = program.stack(len(specs)), record(program, self._started)
        for start in range(0, len(specs), stack.size) if stack.size > 1 else ():
            runs = {self.folder(spec): spec.config for spec in specs[start : start + stack.size]}
            with contextlib.ExitStack() as claims:
                for workdir, config in runs.items():
                    claims.enter_context(workdirs.claim(workdir, config, made_with))
                train(
                    stack,
                    runs,
                    self._checkpoints(specs, folder) / f"from_{start}",
                    launched=launched,
                    begin=lambda own, step, runs=runs: self._begin(own, runs[own], made_with, program, step),
                )

    def program(self, config: RunConfig) -> Program:
        """The program of a run, which is prepared once. The key of a single run is never computed: it takes a trace."""
        for program in self._programs:
            if program_key(program.config) == program_key(config):
                return program
        self._programs.append(prepare(config))
        return self._programs[-1]

    def _checkpoints(self, specs: Sequence[RunSpec], folder: Path) -> Path:
        """The folder of the checkpoints of a stack of these runs. Another set of runs has another folder."""
        return folder / f"stack-{sha256_of([spec.name for spec in specs])[:12]}"

    def _begin(self, workdir: Path, config: RunConfig, made_with: dict[str, Any], program: Program, step: int) -> None:
        """Record in config.json the step at which the run starts, and any jump of the learning rate there."""

        def begin() -> None:
            facts: dict[str, Any] = {"step": step, "total_steps": program.schedule.total}
            if rates := continuation.jump(workdirs.read(workdir), config, program.schedule, step):
                facts["learning_rates"] = rates
            workdirs.begin(workdir, config, made_with, facts)

        hosts.decided(begin)
