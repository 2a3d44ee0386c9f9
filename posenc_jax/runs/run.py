"""A single run: a grid of one. The same call on the same workdir goes on where it ended."""

from pathlib import Path

from posenc_jax.config import RunConfig
from posenc_jax.distributed import hosts
from posenc_jax.reporting import report
from posenc_jax.runs import finish
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.grid import RunSpec, check_first_training
from posenc_jax.schema import ConfigError, flat, plain


def run(config: RunConfig, workdir: Path, *, launched: float) -> None:
    """Do what is left of a run, or show its table if nothing is.

    `launched` is the `time.monotonic()` at which the command began. Raises as `driver.Driver.complete` does.
    """
    check_first_training(config)
    if parts := config.sharding.parallel_runs:
        raise ConfigError("config.sharding.parallel_runs", parts, "must be 0 outside of studies, whose runs it is for")
    hosts.check_same(flat({"config": plain(config), "--workdir": str(workdir)}))
    hosts.decided(lambda: workdirs.check(workdir, config))
    if not hosts.decided(lambda: finish.has_ended(config, workdir)):
        from posenc_jax.runs.driver import Driver  # brings jax, which a finished run, or a wrong setting, needs not

        Driver(lambda _: workdir).complete(RunSpec(config.label, "", config), launched=launched)
    hosts.decided(lambda: report.print_summary(workdir))
