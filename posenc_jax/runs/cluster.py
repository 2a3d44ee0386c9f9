"""Submits a study to a cluster with submitit: one job per shard."""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from posenc_jax.errors import one_line
from posenc_jax.runs.grid import Study
from posenc_jax.runs.program import shards
from posenc_jax.runs.study import left
from posenc_jax.runs.workdir import refuse_links
from posenc_jax.schema import ConfigError, literal

MAX_TIMES = 100


def submit(study: Study, workdir: Path, settings: str, command: Sequence[str]) -> list[Any]:
    """Submit a job for each incomplete shard of a study. Returns the jobs of submitit.

    A job runs the command with --shard. On SLURM, a job that is preempted, or that times out at most `MAX_TIMES`
    times, is submitted again and continues from its last checkpoint. The last job to end writes the report of all runs.

    Args:
      workdir: the study's folder, on a file system that all machines share. The jobs' output goes to its folder jobs.
      settings: settings of submitit's executor, such as "timeout_min=240 slurm_partition=gpu gpus_per_node=1", and
        `cluster`: "slurm" (the default), "local" or "debug".
      command: the command that runs launch.py for this study and workdir. With --shard, its --submit has no effect.

    Raises ConfigError if submitit is not installed or does not accept the settings, and WorkdirError for links.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise ConfigError("--submit", settings, "needs submitit: pip install submitit") from None
    refuse_links(workdir)
    jobs = {}
    try:
        given = {name: literal(value) for name, value in (part.split("=", 1) for part in shlex.split(settings))}
        cluster = given.pop("cluster", "slurm")
        executor = submitit.AutoExecutor(workdir / "jobs", cluster, slurm_max_num_timeout=MAX_TIMES)
        executor.update_parameters(name=study.name, **given)
        for number, specs in enumerate(shards(study.runs), 1):
            if left(specs, workdir):
                jobs[number] = executor.submit(_Shard([*command, f"--shard={number}"]))
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:  # raised by submitit
        raise ConfigError("--submit", settings, f"is not what submitit takes: {one_line(error)}") from error
    for number, job in jobs.items():
        Console().print(Text(f"shard {number}: job {job.job_id}, {job.paths.stdout}"), soft_wrap=True)
    return list(jobs.values())


class _Shard:
    """The work of a job. submitit calls `checkpoint` to submit it again when SLURM stops it."""

    def __init__(self, command: Sequence[str]):
        self._command = command

    def __call__(self) -> None:
        subprocess.run(self._command, check=True)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
