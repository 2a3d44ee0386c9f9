"""Studies as jobs of a cluster, submitted with submitit: one job per shard."""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from posenc_jax.errors import one_line
from posenc_jax.runs.grid import Study, literal
from posenc_jax.runs.program import shards
from posenc_jax.runs.study import left
from posenc_jax.runs.workdir import refuse_links
from posenc_jax.schema import ConfigError

MOST_TIMES = 100


def submit(study: Study, workdir: Path, settings: str, command: Sequence[str]) -> list[Any]:
    """Submit a job for each shard of a study that is not complete. Returns the jobs of submitit.

    A job runs the command with --shard. On SLURM, one that is preempted, or out of time for at most `MOST_TIMES`, is
    submitted again, and goes on from its last checkpoint. The last to end leaves the report of all.

    Args:
      study: whose runs are wanted.
      workdir: of the study, on a file system that all machines share; the jobs' output goes to its folder jobs.
      settings: of submitit's executor, "timeout_min=240 slurm_partition=gpu gpus_per_node=1", and `cluster`: "slurm",
        the default, "local" or "debug".
      command: that runs launch.py for this study and workdir; with --shard, a --submit among its flags has no effect.

    Raises:
      ConfigError: settings that submitit does not take, or submitit is not there.
      WorkdirError: the folder holds links.
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
        executor = submitit.AutoExecutor(workdir / "jobs", cluster, slurm_max_num_timeout=MOST_TIMES)
        executor.update_parameters(name=study.name, **given)
        for number, specs in enumerate(shards(study.runs), 1):
            if left(specs, workdir):
                jobs[number] = executor.submit(_Shard([*command, f"--shard={number}"]))
    except (
        AssertionError,
        NameError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # as submitit raises
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
