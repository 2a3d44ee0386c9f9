"""A single run. The same call on the same workdir continues it."""

from pathlib import Path

from posenc_jax.config import RunConfig
from posenc_jax.distributed import hosts
from posenc_jax.reporting import report
from posenc_jax.runs import finish
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.grid import RunSpec, check_not_pretrained
from posenc_jax.schema import ConfigError, flat, plain


def run(config: RunConfig, workdir: Path, *, launched: float) -> None:
    """Complete a run and print its table. `launched` is that of `train`. Raises what `Driver.complete` raises."""
    check_not_pretrained(config)
    if parts := config.sharding.parallel_runs:
        raise ConfigError("config.sharding.parallel_runs", parts, "must be 0 outside of studies, whose runs it is for")
    hosts.check_same(flat({"config": plain(config), "--workdir": str(workdir)}))
    hosts.on_leader(lambda: workdirs.check(workdir, config))
    if not hosts.on_leader(lambda: finish.is_complete_after_repair(config, workdir)):
        from posenc_jax.runs.driver import Driver  # imports jax, which a finished run does not need

        Driver(lambda _: workdir).complete(RunSpec(config.label, "", config), launched=launched)
    hosts.on_leader(lambda: report.print_summary(workdir))
