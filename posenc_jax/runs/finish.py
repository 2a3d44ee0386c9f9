"""Results, figures and report of a run. The numbers of results.csv come from the sums over windows in windows.npz."""

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posenc_jax import encodings
from posenc_jax.config import RunConfig
from posenc_jax.evaluation.window_sums import WindowSums, read_sums, write_sums
from posenc_jax.files import place_aside
from posenc_jax.reporting import report
from posenc_jax.reporting.tables import escape_markdown
from posenc_jax.reporting.tensorboard import TensorBoard, extrapolation_by_rule
from posenc_jax.reporting.weights_and_biases import Board, WeightsAndBiases
from posenc_jax.results import Result, write_results
from posenc_jax.runs import workdir as workdirs
from posenc_jax.schema import changes, flat, plain

logger = logging.getLogger(__name__)

# Settings that are in TensorBoard's table of hyper-parameters even at their defaults. Its text has all settings.
VARIED = ("seed", "training.length", "training.duration", "optimizer.learning_rate", "encoding.name", "encoding.base")


def finish_run(
    config: RunConfig, workdir: Path, measured: WindowSums, documents: Sequence[str], constants: Any, step: int
) -> None:
    """Write everything that a trained run leaves, and at last that it is complete after `step` steps.

    `measured` has sums over windows, each from one of the `documents`. The `constants` of the trained model give its
    frequencies under each scaling rule.
    """
    from posenc_jax.evaluation import extrapolation  # imports jax, which a finished run does not need

    write_sums(workdir / "windows.npz", measured, documents, workdirs.read(workdir))
    results = _write_results(config, workdir)
    spectra = extrapolation.spectra(config, constants) if len(config.evaluation.rope_scalings) > 1 else None
    extrapolation_by_rule(workdir / "tensorboard", results)
    with contextlib.ExitStack() as boards:
        # In a folder of its own, so that writing it again replaces it.
        tensorboard = boards.enter_context(TensorBoard(workdir / "tensorboard" / "final", purge_step=0))
        shown = (row for row in results if row.scaling == "none" and "by_position" not in row.metric)
        final = {f"windows_final/{row.metric}/{row.eval_length}": row.value for row in shown if row.value is not None}
        settings, listed = flat(plain(config)), {*VARIED, *_chosen(config)}
        tensorboard.hparams({name: x for name, x in settings.items() if name in listed}, final)
        rows = (f"| {name} | {escape_markdown(str(x))} |" for name, x in settings.items())
        tensorboard.text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]))
        shown_on: list[Board] = [tensorboard]
        if config.logging.wandb:
            wandb = boards.enter_context(WeightsAndBiases(workdir, config.logging.wandb))
            wandb.summary(final)
            wandb.extrapolation_curves(results)
            shown_on.append(wandb)
        report.write_report(workdir, spectra, shown_on)
    workdirs.mark_complete(workdir, step)
    shutil.rmtree(workdir / "scores", ignore_errors=True)  # of a ScoreCache


def _chosen(config: RunConfig) -> dict[str, Any]:
    """The hyper-parameters of the encoding that are not at their defaults."""
    defaults = {"encoding": encodings.default_config(config.encoding.name)}
    return changes(defaults, {"encoding": plain(config.encoding.hyperparameters)})


def is_complete_after_repair(config: RunConfig, workdir: Path) -> bool:
    """Whether a run is complete and has its report. Damaged results are moved aside with a warning first.

    If only results.csv is lost, it is written again. If windows.npz is lost, complete.json is removed.
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
                (workdir / workdirs.COMPLETE).unlink(missing_ok=True)
                return False
            _write_results(config, workdir)
            workdirs.mark_complete(workdir, ending["step"])
    return (workdir / "report.md").exists()


def set_aside(path: Path, folder: Path | None = None) -> None:
    """Move a damaged result, if it exists, to a folder, by default `damaged` beside it, and log a warning."""
    if not path.exists():
        logger.warning("%s is missing; it is made again", path)
        return
    kept = place_aside(path, folder or path.with_name("damaged"))
    path.rename(kept)
    logger.warning("%s is damaged; it is now in %s, and is made again", path, kept)


def _write_results(config: RunConfig, workdir: Path) -> list[Result]:
    """Write results.csv from the sums in windows.npz; returns its rows."""
    from posenc_jax.evaluation.run_results import result_rows

    measured, documents, _ = read_sums(workdir / "windows.npz", config)
    results = result_rows(config, measured, documents)
    write_results(workdir / "results.csv", results)
    return results
