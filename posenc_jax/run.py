"""A whole run: data, training, evaluation, report. The same call on the same workdir goes on where it ended."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from posenc_jax import workdir as workdirs
from posenc_jax.allocator import keep_freed_memory
from posenc_jax.config import RunConfig
from posenc_jax.reporting import report
from posenc_jax.schema import plain


def run(config: RunConfig, workdir: Path, *, launched: float) -> None:
    """Do what is left of a run, or show its table if nothing is.

    `launched` is the `time.monotonic()` at which the command began. Raises ConfigError, WorkdirError, and what
    `training.loop.train` raises.
    """
    workdirs.check(workdir, config)
    if not workdirs.is_complete(workdir, config):
        _train_and_evaluate(config, workdir, launched)
    report.print_summary(workdir)


def _train_and_evaluate(config: RunConfig, workdir: Path, launched: float) -> None:
    keep_freed_memory()
    # Imported here, for they bring jax: a complete run is shown, and a wrong setting refused, without it.
    from posenc_jax.data import pipeline, tokens
    from posenc_jax.evaluation import extrapolation
    from posenc_jax.evaluation.scoring import Scorer
    from posenc_jax.reporting.tables import write_results
    from posenc_jax.reporting.tensorboard import TensorBoard
    from posenc_jax.training import loop, sharding, step

    rows = config.training.batch_size // config.training.accumulation
    sharding.divide_cpu(config.training.cpu_devices, rows)
    _keep_compiled_programs(config)
    dataset = tokens.prepare(config.data)
    longest, evaluation = config.evaluation.lengths[-1], config.evaluation
    windows = pipeline.evaluation_windows(dataset.splits["test"], length=longest, count=evaluation.windows)
    validation = pipeline.evaluation_windows(
        dataset.splits["validation"],
        length=config.training.length,
        count=evaluation.validation_windows,
        field="config.training.length",
    )
    (encoded, parameters), (dropped, _) = step.abstract_model(config), step.abstract_model(config, dropped=True)
    mesh = sharding.make_mesh(rows, fsdp=config.sharding.fsdp, tensor=config.sharding.tensor)
    scorers = [Scorer(graphdef, mesh, evaluation.batch_tokens) for graphdef in (encoded, dropped)]
    token_bytes = dataset.tokenizer.token_bytes

    def validate(params: Any, constants: Any, dropped: bool) -> dict[str, float]:
        losses = extrapolation.score(config, scorers[dropped], params, constants, validation.tokens, token_bytes)
        return {"validation_loss": losses.nats_per_token, "validation_bits_per_byte": losses.bits_per_byte}

    with workdirs.claim(workdir, config, _record(dataset, parameters)):
        state = loop.train(config, dataset, mesh, workdir, validate, launched=launched)
        params, constants = state["params"], state["constants"]
        scorer = scorers[config.training.drop_encoding.amount > 0]
        results = extrapolation.evaluate(config, scorer, params, constants, windows.tokens, token_bytes)
        write_results(workdir / "results.csv", results)
        spectra = extrapolation.spectra(config, constants) if len(evaluation.scalings) > 1 else None
        with TensorBoard(workdir / "tensorboard") as tensorboard:
            final = {
                f"final/{row.metric}/{row.eval_length}": row.value
                for row in results
                if row.scaling == "none" and "by_position" not in row.metric
            }
            tensorboard.hparams(plain(config), {tag: value for tag, value in final.items() if value is not None})
            tensorboard.extrapolation(results)
            report.write_report(workdir, spectra, tensorboard)


def _record(dataset: Any, parameters: int) -> dict[str, Any]:
    """What a run was made with."""
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "posenc-jax")
    devices = jax.devices()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in names},
        "device": f"{devices[0].device_kind} x{len(devices)} ({os.cpu_count()} cores, {platform.machine()})",
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
    """The commit of the code, with "+changes" if files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _keep_compiled_programs(config: RunConfig) -> None:
    """Keep compiled programs in a private folder, so that the next start need not compile."""
    import jax

    folder = config.data.cache_path / "compiled"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
