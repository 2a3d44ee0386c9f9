"""A whole run: data, training, evaluation, report. The same call on the same workdir goes on where it ended."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posenc_jax import environment, hosts
from posenc_jax import workdir as workdirs
from posenc_jax.allocator import keep_freed_memory
from posenc_jax.config import RunConfig, flat
from posenc_jax.reporting import report
from posenc_jax.schema import ConfigError, plain


def run(config: RunConfig, workdir: Path, *, launched: float) -> None:
    """Do what is left of a run, or show its table if nothing is.

    `launched` is the `time.monotonic()` at which the command began. Raises ConfigError, WorkdirError, and what
    `training.loop.train` raises.
    """
    if parts := config.sharding.members:
        raise ConfigError("config.sharding.members", parts, "must be 0 outside of studies, whose runs it is for")
    hosts.check_same(flat({"config": plain(config), "--workdir": str(workdir)}))
    hosts.decided(lambda: workdirs.check(workdir, config))
    if not hosts.decided(lambda: workdirs.is_complete(workdir, config)):
        keep_freed_memory()
        Session(config).complete(config, workdir, launched=launched)
    hosts.decided(lambda: report.print_summary(workdir))


class Session:
    """What the runs of a process share that can be members of one program: text, windows, compiled programs."""

    def __init__(self, config: RunConfig):
        # Imported here, for they bring jax: a complete run is shown, and a wrong setting refused, without it.
        from posenc_jax.data import pipeline, tokens
        from posenc_jax.evaluation.scoring import Scorer
        from posenc_jax.evaluation.watch import Watch
        from posenc_jax.rehearsal import rehearse
        from posenc_jax.training import loop, sharding, step

        training, evaluation = config.training, config.evaluation
        rows = training.batch_size // training.accumulation
        sharding.divide_cpu(training.cpu_devices, rows)
        environment.keep_compiled_programs(config.data.cache_path / "compiled")
        made: list[tokens.Dataset] = []  # by the first process; the others find it in the cache
        hosts.decided(lambda: made.append(tokens.prepare(config.data)))
        self.dataset = made[0] if made else tokens.prepare(config.data)
        hosts.check_same({"the fingerprint of the text": self.dataset.fingerprint})
        splits, longest = self.dataset.splits, evaluation.lengths[-1]
        self._windows = pipeline.evaluation_windows(splits["test"], length=longest, count=evaluation.windows).tokens
        self._validation = pipeline.evaluation_windows(
            splits["validation"],
            length=training.length,
            count=evaluation.validation_windows,
            field="config.training.length",
        ).tokens
        self.mesh = sharding.make_mesh(rows, fsdp=config.sharding.fsdp, tensor=config.sharding.tensor)
        (encoded, self._parameters), (dropped, _) = (
            step.abstract_model(config, dropped=drop) for drop in (False, True)
        )
        self._scorers = [Scorer(graphdef, self.mesh, evaluation.batch_tokens) for graphdef in (encoded, dropped)]
        self._watches = [Watch(graphdef, self.mesh) for graphdef in (encoded, dropped)]
        self.programs = loop.programs(config, self.dataset, self.mesh)
        rehearse(
            config,
            loop.Schedule.of(config, pipeline.epoch_tokens(splits["train"], training.length)),
            self.mesh,
            self.programs,
            self._scorers,
            validation_windows=len(self._validation),
            windows=len(self._windows),
        )

    def train_together(self, runs: Mapping[Path, RunConfig], folder: Path) -> None:
        """Train the runs as members of one program, so that `complete` has but to evaluate them.

        `runs` are by their workdirs; `folder` is for checkpoints of all. Raises as `training.stack.train_stack` does.
        """
        from posenc_jax.training.stack import train_stack

        record = _record(self.dataset, self._parameters)
        with contextlib.ExitStack() as claims:
            for workdir, config in runs.items():
                claims.enter_context(workdirs.claim(workdir, config, record))
            train_stack(runs, self.dataset, folder)

    def complete(self, config: RunConfig, workdir: Path, *, launched: float, start: Path | None = None) -> None:
        """Do what is left of one of the runs: training, evaluation, report. Raises as `run` does.

        `start` is the workdir of the run whose trained parameters it starts from, where it does.
        """
        from posenc_jax import trained
        from posenc_jax.evaluation import extrapolation, precision, retrieval
        from posenc_jax.evaluation.measured import write_measured
        from posenc_jax.reporting.tables import write_results
        from posenc_jax.reporting.tensorboard import TensorBoard
        from posenc_jax.training import loop

        token_bytes, record = self.dataset.tokenizer.token_bytes, _record(self.dataset, self._parameters)
        if start is not None:
            record["started_from"] = start.name
        given = None if start is None else trained.load(start, self.mesh).params

        def validate(params: Any, constants: Any, dropped: bool) -> dict[str, Any]:
            scorer = self._scorers[dropped]
            losses = extrapolation.score(config, scorer, params, constants, self._validation, token_bytes)
            values = {"validation_loss": losses.nats_per_token, "validation_bits_per_byte": losses.bits_per_byte}
            return values | self._watches[dropped](config, params, constants, self._validation)

        with workdirs.claim(workdir, config, record):
            precision.warn(config)
            state = loop.train(
                config,
                self.dataset,
                self.mesh,
                workdir,
                validate,
                launched=launched,
                train_steps=self.programs,
                params=given,
            )
            params, constants = state["params"], state["constants"]
            scorer = self._scorers[config.training.drop_encoding.amount > 0]
            measured = extrapolation.measure(config, scorer, params, constants, self._windows, token_bytes)
            measured |= retrieval.measure(config, scorer, params, constants, self._windows, token_bytes)

            def tell() -> None:
                write_measured(workdir / "windows.npz", measured, {**record, "config": plain(config)})
                results = extrapolation.results(config, measured)
                write_results(workdir / "results.csv", results)
                rescaled = len(config.evaluation.scalings) > 1
                spectra = extrapolation.spectra(config, constants) if rescaled else None
                with TensorBoard(workdir / "tensorboard") as tensorboard:
                    final = {
                        f"final/{row.metric}/{row.eval_length}": row.value
                        for row in results
                        if row.scaling == "none" and "by_position" not in row.metric
                    }
                    given = {tag: value for tag, value in final.items() if value is not None}
                    tensorboard.hparams(plain(config), given)
                    tensorboard.extrapolation(results)
                    report.write_report(workdir, spectra, tensorboard)

            hosts.decided(tell)


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
