"""A whole study: its runs, one after another, and the report that they end in. The same call goes on where it ended."""

import contextlib
import functools
import math
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from posenc_jax.distributed import hosts
from posenc_jax.runs import workdir as workdirs
from posenc_jax.distributed.allocator import keep_freed_memory
from posenc_jax.config import RunConfig, TransformerConfig
from posenc_jax.evaluation.measured import Measured, read_measured, write_measured
from posenc_jax.files import read_sealed, sha256, sha256_of, write_sealed
from posenc_jax.reporting import study_report
from posenc_jax.results import Base
from posenc_jax.reporting.metrics_log import read_log
from posenc_jax.reporting.progress import clock
from posenc_jax.results import write_rows
from posenc_jax.results import MemberRow, Rank
from posenc_jax.results import write_results
from posenc_jax.runs.run import Session, has_ended, set_aside
from posenc_jax.schema import ConfigError, plain
from posenc_jax.runs.grid import Member, Study
from posenc_jax.training import flops
from posenc_jax.training.manifest import MANIFEST
from posenc_jax.untrusted import DamagedError, blaming, check_form

# The parts of a member's record, in members/NAME.npz, that the report shows.
RECORD = workdirs.RECORD | {"versions": {"python": str}, "parameters": int, "tokens_per_second": int | float | None}
TABLES = ("results.csv", "by_seed.csv", "ranks.csv", "bases.csv", "members.csv")


def run_study(
    study: Study, workdir: Path, *, launched: float, together: bool | None = None, part: int | None = None
) -> None:
    """Train and evaluate the members that are left, and write the report of all.

    A member has a folder in `workdir`/runs as a run of its own, which goes on from its last checkpoint; once it is
    measured, members/NAME.npz is all that is needed of it. A damaged one is set aside, and made again. A run whose loss
    becomes non-finite is reported, and the others go on. `launched` is the `time.monotonic()` at which the command
    began. Raises as `run.run` does.

    With `together`, members of one program are trained at once, on parts of the devices, and saved together. This is
    the default where the settings give a number of parts, and on accelerators, unless they divide a model over devices
    or there are many processes, which refuse it. Otherwise members share the program too, but take turns: each then has
    all cores or devices, and is done for good when its turn is over.

    With `part`, which counts from 1, only members of that one of `parts` are trained: others may run at the same time,
    but not the whole study. Raises ConfigError if there is no such part.
    """
    parted = study.members[0].config.sharding.parallel_runs
    for field, value in (("--stack_runs", together), ("config.sharding.parallel_runs", parted)):
        if value and hosts.count() > 1:
            raise ConfigError(field, value, f"must be left out where {hosts.count()} processes do a run")
    members = study.members if part is None else _part(study, part)
    names = [member.name for member in members]
    hosts.check_same({"--workdir": str(workdir), "config.sweep": names})
    with contextlib.ExitStack() as held:

        def begin() -> list[str]:
            workdirs.refuse_links(workdir)
            if left(members, workdir):
                divide_cpu(study)
            held.enter_context(workdirs.lock(workdir, shared=part is not None))
            if part is not None:
                held.enter_context(workdirs.lock(workdir / "parts" / str(part)))
            (workdir / "members").mkdir(exist_ok=True)
            waiting = left(members, workdir)
            for member in waiting:
                if _kept(workdir, member).exists():
                    set_aside(_kept(workdir, member), workdir / "damaged")
            _check_texts(study, waiting, workdir)
            return [member.name for member in waiting]

        wanted = hosts.decided(begin)
        remaining = [member for member in members if member.name in wanted]
        tell = functools.partial(_tell, study, workdir, part)
        try:
            if remaining:
                keep_freed_memory()
                _train(remaining, len(members), workdir, launched, together)
        except BaseException as error:  # also of those that are done when a signal stops it
            if hosts.is_leader():
                tell()
                if isinstance(error, ConfigError):
                    _remove_unused(workdir)
            raise
        hosts.decided(tell)
    hosts.decided(lambda: study_report.print_summary(workdir))


def _remove_unused(workdir: Path) -> None:
    """Remove the folder of a study if nothing was written in it but its locks."""
    ours = {path.name for path in workdir.iterdir()} <= {"lock", "members", "runs", "parts"}
    if ours and not any(path.is_file() and path.name != "lock" for path in workdir.rglob("*")):
        shutil.rmtree(workdir, ignore_errors=True)


def _tell(study: Study, workdir: Path, part: int | None) -> None:
    with contextlib.nullcontext() if part is None else workdirs.lock(workdir / "parts", wait=True):
        if _has_news(study, workdir):
            write_results_of(study, workdir)


def divide_cpu(study: Study) -> None:
    """Find the devices, as many of a CPU as every run of a study can share its batches over. Raises ConfigError."""
    from posenc_jax.distributed import sharding

    training = [member.config.training for member in study.members]
    rows = math.gcd(*(own.batch_size // own.grad_accum_steps for own in training))
    sharding.divide_cpu(min(own.cpu_devices for own in training), rows)


def left(members: Sequence[Member], workdir: Path) -> list[Member]:
    """Those that are not measured yet, or whose measurements are damaged."""
    return [member for member in members if _read(workdir, member) is None]


def _read(workdir: Path, member: Member) -> tuple[Measured, tuple[str, ...], dict[str, Any]] | None:
    """What was measured of a member, and its record; None if there is nothing intact."""
    try:
        found = read_measured(_kept(workdir, member), member.config)
        with blaming(_kept(workdir, member)):
            check_form(found[2], RECORD)
        return found
    except (FileNotFoundError, DamagedError):
        return None


def _check_texts(study: Study, waiting: Sequence[Member], workdir: Path) -> None:
    """Raise WorkdirError if runs that are compared are of other texts than each other, or than is here for the rest."""
    texts: dict[str, dict[str, Any]] = {}
    for member in study.members:
        found, folder = _read(workdir, member), workdir / "runs" / member.name
        record = found[2] if found else workdirs.read(folder) if (folder / "config.json").exists() else None
        if record is not None:
            texts.setdefault(_text_of(member), {})[member.name] = record
    for member in {_text_of(member): member for member in waiting}.values():
        from posenc_jax.data import tokens

        here = {"data": {"fingerprint": tokens.prepare(member.config.data).fingerprint}}
        here["versions"] = {"python": platform.python_version()}
        texts.setdefault(_text_of(member), {})["this machine"] = here
    for records in texts.values():
        workdirs.check_same_text(records)


def _text_of(member: Member) -> str:
    """The settings that the text and its tokens are made from."""
    return sha256_of({**plain(member.config.data), "cache_dir": ""})


def parts(study: Study) -> list[list[Member]]:
    """The members of each program, with those that start from their parameters: what one machine does for itself."""
    from posenc_jax.runs.members import program_of

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
        raise ConfigError("--shard", number, f"must be from 1 to {len(found)}, the programs of this study")
    return found[number - 1]


def _has_news(study: Study, workdir: Path) -> bool:
    """Whether there is something that the report was not made of, or a table is not as it was written.

    A damaged table is set aside.
    """
    sources = _sources(study, workdir)
    if not any(name.startswith("members/") for name in sources):
        return False
    try:
        ended = read_sealed(workdir / workdirs.COMPLETE, {"sources": dict, "files": dict.fromkeys(TABLES, str)})
    except (FileNotFoundError, ValueError):
        return True
    if ended["sources"] != sources:
        return True
    lost = workdirs.lost_files(workdir, {name: ended["files"][name] for name in TABLES})
    for name in lost:
        set_aside(workdir / name)
    return bool(lost) or not (workdir / "report.md").exists()


def _sources(study: Study, workdir: Path) -> dict[str, str]:
    """The sums of the files that the report is made of."""
    paths = [study_report.discussion(workdir), *(_kept(workdir, member) for member in study.members)]
    return {path.relative_to(workdir).as_posix(): sha256(path) for path in paths if path.exists()}


def write_results_of(study: Study, workdir: Path) -> None:
    """The tables and the report of the members that are done. Raises NonFiniteLoss if none ended well."""
    # Imported here, for it brings jax: a study that is done is shown without it.
    from posenc_jax.evaluation import extrapolation
    from posenc_jax.evaluation.pooling import Pool
    from posenc_jax.runs.train import NonFiniteLoss

    sources, rows, by_seed = _sources(study, workdir), [], []
    measured: dict[str, dict[int, Measured]] = {}
    windows: dict[tuple[str, ...], str] = {}  # a member for each list of documents that was read
    for member in study.members:
        if found := _read(workdir, member):
            own, read, record = found
            rows.append(_row(member, record))
            results = extrapolation.results(member.config, own, read)
            by_seed += [replace(row, encoding=member.variant) for row in results]
            if own:
                measured.setdefault(member.variant, {})[member.config.seed] = own
                windows[read] = member.name
    write_rows(workdir / "members.csv", MemberRow, rows)
    if not measured:
        raise NonFiniteLoss(f"no run ended well; {workdir / 'members.csv'} says how each did")
    if len(windows) > 1:
        names = " and ".join(windows.values())
        raise workdirs.WorkdirError(f"workdir {workdir} holds members measured on different documents: {names}")
    config = study.members[0].config
    (documents,) = windows
    pool = Pool(study.name, measured, documents, config.pretrained_length, config.evaluation.resamples)
    results = pool.results(study.baseline)
    write_results(workdir / "results.csv", results)
    write_results(workdir / "by_seed.csv", by_seed)
    write_rows(workdir / "ranks.csv", Rank, pool.ranks(results))
    write_rows(workdir / "bases.csv", Base, bases(study))
    groups = {member.variant: member.group for member in study.members}
    command = shlex.join(["python", *sys.argv])
    costs = Path(study.costs) if study.costs else None
    study_report.write_report(workdir, study.question, command, groups, len(study.members), costs)
    files = {name: sha256(workdir / name) for name in TABLES}
    write_sealed(workdir / workdirs.COMPLETE, {"sources": sources, "files": files})


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
            width, first, length = config.model.head_dim, config.pretrained_length, config.training.length
            pretrained_base = (member.parent or member).config.encoding.hyperparameters.base
            yield Base(
                variant,
                width,
                own.base,
                rope_theory.critical_dimension(width, pretrained_base, first),
                rope_theory.extrapolation_bound(width, pretrained_base, first, own.base, length),
                rope_theory.attended_distance(width, own.base, config.evaluation.lengths[-1]),
                *rope_theory.small_bases(length),
            )


def _train(remaining: Sequence[Member], total: int, workdir: Path, launched: float, together: bool | None) -> None:
    from posenc_jax.runs.train import NonFiniteLoss

    console, begun, trainer = Console(), time.monotonic(), _Trainer(remaining, workdir, together)
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
        if hosts.is_leader():
            found = read_measured(own / "windows.npz") if not stopped else ({}, (), workdirs.read(own))
            measured, documents, record = found
            record = record | {"tokens_per_second": _speed(own)} | ({"stopped": stopped} if stopped else {})
            write_measured(_kept(workdir, member), measured, documents, record)


class _Trainer:
    """Trains and evaluates members of a study, with one session for all that share a program."""

    def __init__(self, remaining: Sequence[Member], workdir: Path, together: bool | None):
        self._remaining, self._workdir, self._together = remaining, workdir, together
        self._sessions: dict[Hashable, Session] = {}

    def folder(self, member: Member) -> Path:
        return self._workdir / "runs" / member.name

    def complete(self, member: Member, *, launched: float) -> None:
        """Do what is left of a member, and of the one whose parameters it starts from."""
        if hosts.decided(functools.partial(has_ended, member.config, self.folder(member))):
            return
        start = None
        if member.parent:
            self.complete(member.parent, launched=launched)
            start = self.folder(member.parent)
        session = self._session(member)
        session.complete(member.config, self.folder(member), launched=launched, start=start)

    def _session(self, member: Member) -> Session:
        from posenc_jax.runs.members import program_of

        program = program_of(member.config)
        if program not in self._sessions:
            self._sessions[program] = Session(member.config)
            at_once = trained_at_once(member.config) if self._together is None else self._together
            if at_once and not member.parent:
                own = [m for m in self._remaining if not m.parent and program_of(m.config) == program]
                if group := self._untrained(own):
                    runs = {self.folder(m): m.config for m in group}
                    self._sessions[program].train_together(runs, self._together_folder(group))
        return self._sessions[program]

    def _untrained(self, members: Sequence[Member]) -> Sequence[Member]:
        """Those to train together: without a checkpoint of their own, unless all were begun together before."""
        if self._together_folder(members).exists():
            return members
        return [m for m in members if not any(self.folder(m).glob(f"checkpoints/step_*/{MANIFEST}"))]

    def _together_folder(self, members: Sequence[Member]) -> Path:
        """The folder for the checkpoints of these members. Checkpoints of other members would not fit."""
        return self._workdir / "runs" / f"together-{sha256_of([member.name for member in members])[:12]}"


def trained_at_once(config: RunConfig) -> bool:
    """Whether the members of a program each have a part of the devices, or by turns all of them, as the CPU's."""
    import jax

    if config.sharding.parallel_runs:
        return True
    undivided = config.sharding.fsdp * config.sharding.tensor == 1
    # Of many processes none could read the states of all members.
    return undivided and hosts.count() == 1 and jax.devices()[0].platform != "cpu"


def _speed(workdir: Path) -> float | None:
    """Tokens per second in training, the median of the logged steps; None if there were none."""
    lines = read_log(workdir / "metrics.jsonl").entries
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return statistics.median(speeds) if speeds else None


def _row(member: Member, record: Mapping[str, Any]) -> MemberRow:
    starts = record["sessions"]
    versions = [
        ", ".join(f"{name} {version}" for name, version in start["versions"].items() if version) for start in starts
    ]
    return MemberRow(
        variant=member.variant,
        seed=member.config.seed,
        run=member.name,
        parameters=record["parameters"],
        flops_per_token=flops.per_token(member.config),
        tokens_per_second=record["tokens_per_second"],
        device=_distinct(start["device"] for start in starts),
        git_revision=_distinct(start["git_revision"] or "unknown" for start in starts),
        versions=_distinct(versions),
        windows_asked=record["windows"]["asked"],
        windows=record["windows"]["found"],
        documents=record["windows"]["documents"],
        stopped=str(record.get("stopped", "")),
    )


def _distinct(texts: Iterable[str]) -> str:
    """What the starts of a run had: one text, or all that differ."""
    return "; ".join(dict.fromkeys(texts))


def _kept(workdir: Path, member: Member) -> Path:
    return workdir / "members" / f"{member.name}.npz"
