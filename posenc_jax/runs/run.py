"""A whole run: data, training, evaluation, report. The same call on the same workdir goes on where it ended."""

import contextlib
import functools
import importlib.metadata
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posenc_jax.runs import compile_cache
from posenc_jax.training.schedule import Schedule
from posenc_jax.distributed import hosts
from posenc_jax.runs import workdir as workdirs
from posenc_jax.distributed.allocator import keep_freed_memory
from posenc_jax.config import RunConfig, flat
from posenc_jax.files import place_aside
from posenc_jax.reporting import report
from posenc_jax.schema import ConfigError, plain
from posenc_jax.runs.grid import check_first_training

logger = logging.getLogger(__name__)


def run(config: RunConfig, workdir: Path, *, launched: float) -> None:
    """Do what is left of a run, or show its table if nothing is.

    `launched` is the `time.monotonic()` at which the command began. Raises ConfigError, WorkdirError, and what
    `training.loop.train` raises.
    """
    check_first_training(config)
    if parts := config.sharding.parallel_runs:
        raise ConfigError("config.sharding.parallel_runs", parts, "must be 0 outside of studies, whose runs it is for")
    hosts.check_same(flat({"config": plain(config), "--workdir": str(workdir)}))
    hosts.decided(lambda: workdirs.check(workdir, config))
    if not hosts.decided(lambda: has_ended(config, workdir)):
        keep_freed_memory()
        Session(config).complete(config, workdir, launched=launched)
    hosts.decided(lambda: report.print_summary(workdir))


def has_ended(config: RunConfig, workdir: Path) -> bool:
    """Whether nothing is left to do for a run. Damaged results are named and set aside first.

    results.csv is made again if the sums of the windows are intact. jax is not imported if all results are intact.
    """
    try:
        ending = workdirs.ending(workdir, config)
    except ValueError:
        with workdirs.lock(workdir):
            set_aside(workdir / workdirs.COMPLETE)
        return False
    if ending is None:
        return False
    if lost := workdirs.lost_files(workdir, ending["files"]):
        with workdirs.lock(workdir):
            for name in lost:
                set_aside(workdir / name)
            if "windows.npz" in lost:
                return False
            _write_results(config, workdir)
            workdirs.mark_complete(workdir, ending["step"])
    return (workdir / "report.md").exists()


def _write_results(config: RunConfig, workdir: Path) -> list[Any]:
    """Write results.csv from the sums in windows.npz; returns its rows."""
    from posenc_jax.evaluation import extrapolation
    from posenc_jax.evaluation.measured import read_measured
    from posenc_jax.results import write_results

    measured, documents, _ = read_measured(workdir / "windows.npz", config)
    results = extrapolation.results(config, measured, documents)
    write_results(workdir / "results.csv", results)
    return results


def set_aside(path: Path, folder: Path | None = None) -> None:
    """Move a damaged result, if it is there, to a folder, by default `damaged` beside it, and warn in one line."""
    if not path.exists():
        logger.warning("%s is missing; it is made again", path)
        return
    kept = place_aside(path, folder or path.with_name("damaged"))
    path.rename(kept)
    logger.warning("%s is damaged; it is now in %s, and is made again", path, kept)


class Session:
    """What the runs of a process share that can be members of one program: text, windows, compiled programs."""

    def __init__(self, config: RunConfig):
        # Imported here, for they bring jax: a complete run is shown, and a wrong setting refused, without it.
        from posenc_jax.data import pipeline, tokens
        from posenc_jax.evaluation.scoring import Scorer
        from posenc_jax.evaluation.attention_stats import AttentionStats
        from posenc_jax.runs.rehearsal import rehearse
        from posenc_jax.training import memory, step
        from posenc_jax.runs import train
        from posenc_jax.distributed import sharding

        self._started = datetime.now(UTC).isoformat()
        training, evaluation = config.training, config.evaluation
        rows = training.batch_size // training.grad_accum_steps
        sharding.divide_cpu(training.cpu_devices, rows)
        compile_cache.keep_compiled_programs(config.data.cache_path / "compiled")
        made: list[tokens.Dataset] = []  # by the first process; the others find it in the cache
        hosts.decided(lambda: made.append(tokens.prepare(config.data)))
        self.dataset = made[0] if made else tokens.prepare(config.data)
        hosts.check_same({"the fingerprint of the text": self.dataset.fingerprint})
        splits, longest, self._asked = self.dataset.splits, evaluation.lengths[-1], evaluation.windows
        self._windows = pipeline.evaluation_windows(splits["test"], length=longest, count=evaluation.windows)
        self._validation = pipeline.evaluation_windows(
            splits["validation"],
            length=training.length,
            count=evaluation.validation_windows,
            field="config.training.length",
        ).tokens
        self.mesh = sharding.make_mesh(rows, fsdp=config.sharding.fsdp, tensor=config.sharding.tensor)
        memory.check_fits(config, self.mesh)
        (encoded, self._parameters), (dropped, _) = (
            step.abstract_model(config, dropped=drop) for drop in (False, True)
        )
        memory.check_fits(config, self.mesh, self._parameters)
        self._scorers = [Scorer(graphdef, self.mesh, evaluation.batch_tokens) for graphdef in (encoded, dropped)]
        self._attention_stats = [AttentionStats(graphdef, self.mesh) for graphdef in (encoded, dropped)]
        self.programs = train.programs(config, self.dataset, self.mesh)
        self._epoch_tokens = pipeline.epoch_tokens(splits["train"], training.length)
        rehearse(
            config,
            Schedule.of(config, self._epoch_tokens),
            self.mesh,
            self.programs,
            self._scorers,
            self._attention_stats,
            validation_windows=len(self._validation),
            windows=len(self._windows.tokens),
        )

    def train_together(self, runs: Mapping[Path, RunConfig], folder: Path) -> None:
        """Train the runs as members of one program, so that `complete` has but to evaluate them.

        `runs` are by their workdirs; `folder` is for checkpoints of all. Raises as `training.stack.train_stack` does.
        """
        from posenc_jax.runs.stack import train_stack

        record = self._record()
        with contextlib.ExitStack() as claims:
            for workdir, config in runs.items():
                claims.enter_context(workdirs.claim(workdir, config, record))
            train_stack(
                runs,
                self.dataset,
                folder,
                begin=lambda workdir, step: self._begin(runs[workdir], workdir, record, step),
            )

    def complete(self, config: RunConfig, workdir: Path, *, launched: float, start: Path | None = None) -> None:
        """Do what is left of one of the runs: training, evaluation, report. Raises as `run` does.

        `start` is the workdir of the run whose trained parameters it starts from, where it does.
        """
        from posenc_jax.runs import continuation
        from posenc_jax.runs import trained
        from posenc_jax.evaluation import extrapolation, precision, retrieval
        from posenc_jax.evaluation.measured import write_measured
        from posenc_jax.reporting.tensorboard import TensorBoard, extrapolation_by_rule
        from posenc_jax.runs import train

        token_bytes, record = self.dataset.tokenizer.token_bytes, self._record()
        windows, documents = self._windows.tokens, self._windows.documents
        if start is not None:
            record["started_from"] = start.name
        schedule = Schedule.of(config, self._epoch_tokens)
        given = None if start is None else trained.load(start, self.mesh).params

        def validate(params: Any, constants: Any, dropped: bool) -> dict[str, Any]:
            scorer = self._scorers[dropped]
            losses = extrapolation.score(config, scorer, params, constants, self._validation, token_bytes)
            values = {"validation_loss": losses.nats_per_token, "validation_bits_per_byte": losses.bits_per_byte}
            return values | self._attention_stats[dropped](config, params, constants, self._validation)

        may_go_on = functools.partial(continuation.check_duration, workdir, config, schedule)
        with workdirs.claim(workdir, config, record, may_go_on):
            precision.warn(config)
            state = train.train(
                config,
                self.dataset,
                self.mesh,
                workdir,
                validate,
                launched=launched,
                train_steps=self.programs,
                params=given,
                begin=functools.partial(self._begin, config, workdir, record),
            )
            params, constants = state["params"], state["constants"]
            scorer = self._scorers[config.training.drope.amount > 0]
            measured = extrapolation.measure(config, scorer, params, constants, windows, token_bytes)
            measured |= retrieval.measure(config, scorer, params, constants, windows, token_bytes, documents)

            def tell() -> None:
                write_measured(workdir / "windows.npz", measured, documents, workdirs.read(workdir))
                results = _write_results(config, workdir)
                rescaled = len(config.evaluation.rope_scalings) > 1
                spectra = extrapolation.spectra(config, constants) if rescaled else None
                extrapolation_by_rule(workdir / "tensorboard", results)
                # In a folder of its own, so that writing it again replaces it.
                with TensorBoard(workdir / "tensorboard" / "final", purge_step=0) as tensorboard:
                    final = {
                        f"final/{row.metric}/{row.eval_length}": row.value
                        for row in results
                        if row.scaling == "none" and "by_position" not in row.metric
                    }
                    given = {tag: value for tag, value in final.items() if value is not None}
                    tensorboard.hparams(plain(config), given)
                    report.write_report(workdir, spectra, tensorboard)
                workdirs.mark_complete(workdir, schedule.total)

            hosts.decided(tell)

    def _begin(self, config: RunConfig, workdir: Path, record: dict[str, Any], step: int) -> None:
        from posenc_jax.runs import continuation
        from posenc_jax.runs import train

        def begin() -> None:
            schedule = Schedule.of(config, self._epoch_tokens)
            facts: dict[str, Any] = {"step": step, "total_steps": schedule.total}
            if rates := continuation.jump(workdirs.read(workdir), config, schedule, step):
                facts["learning_rates"] = rates
            workdirs.begin(workdir, config, record, facts)

        hosts.decided(begin)

    def _record(self) -> dict[str, Any]:
        """What a run was made with, and the windows that it is evaluated on."""
        found = self._windows.documents
        windows = {"asked": self._asked, "found": len(found), "documents": len(set(found))}
        return {"started": self._started, **_record(self.dataset, self._parameters), "windows": windows}


def _record(dataset: Any, parameters: int) -> dict[str, Any]:
    """What a run was made with."""
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "posenc-jax")
    devices = jax.devices()
    place = [f"{hosts.count()} processes"] if hosts.count() > 1 else []
    place += [f"{os.cpu_count()} cores", platform.machine()]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in names},
        "device": f"{devices[0].device_kind} x{len(devices)} ({', '.join(place)})",
        "git_revision": _git_revision(),
        "parameters": parameters,
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "splits": {
                name: {"documents": len(split.names), "tokens": len(split.tokens), "bytes": int(split.num_bytes)}
                for name, split in dataset.splits.items()
            },
        },
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
