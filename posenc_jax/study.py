"""A whole study: its runs, one after another, and the report that they end in. The same call goes on where it ended."""

import contextlib
import functools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from posenc_jax import hosts
from posenc_jax import workdir as workdirs
from posenc_jax.allocator import keep_freed_memory
from posenc_jax.config import RunConfig, TransformerConfig
from posenc_jax.reporting import study_report
from posenc_jax.reporting.base_figures import Base
from posenc_jax.reporting.progress import clock
from posenc_jax.reporting.rows import read_rows, write_rows
from posenc_jax.reporting.study_report import MemberRow, Rank
from posenc_jax.reporting.tables import write_results
from posenc_jax.run import Session
from posenc_jax.schema import ConfigError
from posenc_jax.sweep import Member, Study
from posenc_jax.training import flops


def run_study(
    study: Study, workdir: Path, *, launched: float, together: bool | None = None, part: int | None = None
) -> None:
    """Train and evaluate the members that are left, and write the report of all.

    A member has a folder in `workdir`/runs as a run of its own, which goes on from its last checkpoint; once it is
    measured, members/NAME.npz is all that is needed of it. One whose loss becomes non-finite is reported, and the
    others go on. `launched` is the `time.monotonic()` at which the command began. Raises as `run.run` does.

    With `together`, members of one program are trained at once, on parts of the devices, and saved together. This is
    the default where the settings give a number of parts, and on accelerators, unless they divide a model over devices
    or there are many processes, which refuse it. Otherwise members share the program too, but take turns: each then has
    all cores or devices, and is done for good when its turn is over.

    With `part`, which counts from 1, only members of that one of `parts` are trained: others may run at the same time.
    Raises ConfigError if there is no such part.
    """
    parted = study.members[0].config.sharding.members
    for field, value in (("--together", together), ("config.sharding.members", parted)):
        if value and hosts.count() > 1:
            raise ConfigError(field, value, f"must be left out where {hosts.count()} processes do a run")
    members = study.members if part is None else _part(study, part)
    names = [member.name for member in members]
    hosts.check_same({"--workdir": str(workdir), "config.sweep": names})
    if left(members, workdir):
        divide_cpu(study)
    with contextlib.ExitStack() as held:

        def begin() -> list[str]:
            held.enter_context(workdirs.lock(workdir if part is None else workdir / "parts" / str(part)))
            (workdir / "members").mkdir(exist_ok=True)
            return [member.name for member in left(members, workdir)]

        wanted = hosts.decided(begin)
        remaining = [member for member in members if member.name in wanted]
        tell = functools.partial(_tell, study, workdir, part)
        try:
            if remaining:
                keep_freed_memory()
                _train(study, remaining, len(members), workdir, launched, together)
        except BaseException:  # also of those that are done when a signal stops it
            if hosts.leads():
                tell()
            raise
        hosts.decided(tell)
    hosts.decided(lambda: study_report.print_summary(workdir))


def _tell(study: Study, workdir: Path, part: int | None) -> None:
    with contextlib.nullcontext() if part is None else workdirs.lock(workdir, wait=True):
        if _has_news(study, workdir):
            write_results_of(study, workdir)


def divide_cpu(study: Study) -> None:
    """Find the devices, as many of a CPU as every run of a study can share its batches over. Raises ConfigError."""
    from posenc_jax.training import sharding

    training = [member.config.training for member in study.members]
    rows = math.gcd(*(own.batch_size // own.accumulation for own in training))
    sharding.divide_cpu(min(own.cpu_devices for own in training), rows)


def left(members: Sequence[Member], workdir: Path) -> list[Member]:
    """Those that are not measured yet."""
    return [member for member in members if not _kept(workdir, member).exists()]


def parts(study: Study) -> list[list[Member]]:
    """The members of each program, with those that start from their parameters: what one machine does for itself."""
    from posenc_jax.training.members import program_of

    found: dict[Hashable, list[Member]] = {}
    for member in study.members:
        first = member
        while first.parent:
            first = first.parent
        found.setdefault(program_of(first.config), []).append(member)
    return list(found.values())


def _part(study: Study, number: int) -> list[Member]:
    found = parts(study)
    if not 1 <= number <= len(found):
        raise ConfigError("--part", number, f"must be from 1 to {len(found)}, the programs of this study")
    return found[number - 1]


def _has_news(study: Study, workdir: Path) -> bool:
    """Whether there is something that the report, if there is one, was not made of."""
    done = {member.name for member in study.members if _kept(workdir, member).exists()}
    report, table = workdir / "report.md", workdir / "members.csv"
    if not done or not report.exists() or not table.exists():
        return bool(done)
    told = {row.run for row in read_rows(table, MemberRow)}
    sources = (table, study_report.discussion(workdir), *(workdir / "members").glob("*.npz"))
    newest = max(path.stat().st_mtime_ns for path in sources if path.exists())
    return told != done or report.stat().st_mtime_ns < newest


def write_results_of(study: Study, workdir: Path) -> None:
    """The tables and the report of the members that are done. Raises NonFiniteLoss if none ended well."""
    # Imported here, for it brings jax: a study that is done is shown without it.
    from posenc_jax.evaluation import extrapolation
    from posenc_jax.evaluation.measured import Measured, read_measured
    from posenc_jax.evaluation.pooling import Pool
    from posenc_jax.training.loop import NonFiniteLoss

    rows, by_seed = [], []
    measured: dict[str, dict[int, Measured]] = {}
    for member in study.members:
        if _kept(workdir, member).exists():
            own, record = read_measured(_kept(workdir, member))
            rows.append(_row(member, record))
            by_seed += [replace(row, encoding=member.variant) for row in extrapolation.results(member.config, own)]
            if own:
                measured.setdefault(member.variant, {})[member.config.seed] = own
    write_rows(workdir / "members.csv", MemberRow, rows)
    if not measured:
        raise NonFiniteLoss(f"no run ended well; {workdir / 'members.csv'} says how each did")
    config = study.members[0].config
    pool = Pool(study.name, measured, config.training.length, config.evaluation.resamples)
    results = pool.results(study.baseline)
    write_results(workdir / "results.csv", results)
    write_results(workdir / "by_seed.csv", by_seed)
    write_rows(workdir / "ranks.csv", Rank, pool.ranks(results))
    write_rows(workdir / "bases.csv", Base, bases(study))
    groups = {member.variant: member.group for member in study.members}
    command = shlex.join(["python", *sys.argv])
    costs = Path(study.costs) if study.costs else None
    study_report.write_report(workdir, study.question, command, groups, len(study.members), costs)


def bases(study: Study) -> Iterator[Base]:
    """What theory says of the bases in the study, of encodings that rotate all channels as they were trained to."""
    from posenc_jax.encodings import rope_theory

    for variant, (member, *_) in study.variants.items():
        config, own = member.config, member.config.encoding.hyperparameters
        if (
            getattr(own, "scaling", None) == "none"
            and own.fraction == 1
            and isinstance(config.model, TransformerConfig)
        ):
            width, length = config.model.head_dim, config.training.length
            yield Base(
                variant,
                width,
                own.base,
                rope_theory.critical_dimension(width, own.base, length),
                rope_theory.extrapolation_bound(width, own.base, length),
                rope_theory.attended_distance(width, own.base, config.evaluation.lengths[-1]),
                *rope_theory.small_bases(length),
            )


def _train(
    study: Study, remaining: Sequence[Member], total: int, workdir: Path, launched: float, together: bool | None
) -> None:
    from posenc_jax.evaluation.measured import read_measured, write_measured
    from posenc_jax.training.loop import NonFiniteLoss

    console, begun, trainer = Console(), time.monotonic(), _Trainer(study, workdir, together)
    for count, member in enumerate(remaining):
        line = f"run {total - len(remaining) + count + 1} of {total}: {member.variant}, seed {member.config.seed}"
        if count:
            line += f"; about {clock((time.monotonic() - begun) / count * (len(remaining) - count))} left"
        console.print(Text(line, "bold"), soft_wrap=True)
        own, stopped = trainer.folder(member), ""
        try:
            trainer.complete(member, launched=time.monotonic() if count else launched)
        except NonFiniteLoss as error:
            stopped = str(error)
            console.print(Text(f"{member.variant}, seed {member.config.seed}: {stopped}"), soft_wrap=True)
        if hosts.leads():
            found = read_measured(own / "windows.npz") if not stopped else ({}, workdirs.read(own))
            measured, record = found[0], found[1] | ({"stopped": stopped} if stopped else {})
            write_measured(_kept(workdir, member), measured, record | {"tokens_per_second": _speed(own)})


class _Trainer:
    """Trains and evaluates members of a study, with one session for all that share a program."""

    def __init__(self, study: Study, workdir: Path, together: bool | None):
        self._study, self._workdir, self._together = study, workdir, together
        self._sessions: dict[Hashable, Session] = {}

    def folder(self, member: Member) -> Path:
        return self._workdir / "runs" / member.name

    def complete(self, member: Member, *, launched: float) -> None:
        """Do what is left of a member, and of the one whose parameters it starts from."""
        parent, start = member.parent, None
        if parent:
            start = self.folder(parent)
            if not hosts.decided(functools.partial(workdirs.is_complete, start, parent.config)):
                self.complete(parent, launched=launched)
        session = self._session(member)
        session.complete(member.config, self.folder(member), launched=launched, start=start)

    def _session(self, member: Member) -> Session:
        from posenc_jax.training.members import program_of

        program = program_of(member.config)
        if program not in self._sessions:
            self._sessions[program] = Session(member.config)
            at_once = trained_at_once(member.config) if self._together is None else self._together
            if at_once and not member.parent:
                group = [m for m in self._study.members if not m.parent and program_of(m.config) == program]
                runs = {self.folder(m): m.config for m in group}
                self._sessions[program].train_together(runs, self._workdir / "runs" / f"together-{group[0].name}")
        return self._sessions[program]


def trained_at_once(config: RunConfig) -> bool:
    """Whether the members of a program each have a part of the devices, or by turns all of them, as the CPU's."""
    import jax

    if config.sharding.members:
        return True
    undivided = config.sharding.fsdp * config.sharding.tensor == 1
    # Of many processes none could read the states of all members.
    return undivided and hosts.count() == 1 and jax.devices()[0].platform != "cpu"


def _speed(workdir: Path) -> float | None:
    """Tokens per second in training, the median of the logged steps; None if there were none."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [line["tokens_per_second"] for line in map(json.loads, lines) if "tokens_per_second" in line]
    return statistics.median(speeds) if speeds else None


def _row(member: Member, record: Mapping[str, Any]) -> MemberRow:
    return MemberRow(
        variant=member.variant,
        seed=member.config.seed,
        run=member.name,
        parameters=record["parameters"],
        flops_per_token=flops.per_token(member.config),
        tokens_per_second=record["tokens_per_second"],
        device=record["device"],
        git_revision=record["git_revision"] or "unknown",
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items() if version),
        stopped=record.get("stopped", ""),
    )


def _kept(workdir: Path, member: Member) -> Path:
    return workdir / "members" / f"{member.name}.npz"
