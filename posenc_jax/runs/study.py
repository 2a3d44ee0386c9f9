"""A study: its runs, alone or in stacks, its tables and report. The same call on the same workdir continues it."""

import contextlib
import functools
import math
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from posenc_jax.config import RunConfig, TransformerConfig
from posenc_jax.distributed import hosts
from posenc_jax.evaluation.window_sums import WindowSums, read_sums, write_sums
from posenc_jax.files import read_sealed, sha256, sha256_of, write_sealed
from posenc_jax.reporting import study_report
from posenc_jax.reporting.metrics_log import read_log
from posenc_jax.reporting.progress import clock
from posenc_jax.results import Base, MemberRow, Rank, write_results, write_rows
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.finish import set_aside
from posenc_jax.runs.grid import RunSpec, Study
from posenc_jax.schema import ConfigError, plain
from posenc_jax.training import flops
from posenc_jax.untrusted import DamagedError, check_form, damaged_if_invalid

# The part of the record in members/NAME.npz that the report shows.
RECORD = workdirs.RECORD | {"versions": {"python": str}, "parameters": int, "tokens_per_second": int | float | None}
TABLES = ("results.csv", "by_seed.csv", "ranks.csv", "bases.csv", "members.csv")


def run_study(
    study: Study, workdir: Path, *, launched: float, stack_runs: bool | None = None, shard: int | None = None
) -> None:
    """Train and evaluate the runs that are not complete, and write the report of the study.

    Each run has a folder in `workdir`/runs, like a single run, and continues from its last checkpoint. A run that is
    evaluated leaves members/NAME.npz, and its folder is no longer needed. A damaged file there is moved aside, and the
    run is evaluated again. A run whose loss becomes non-finite is reported, and the others continue. `launched` is the
    `time.monotonic()` at which the command began. Raises what `run.run` raises.

    With `stack_runs`, runs of one program are trained at the same time on parts of the devices, and saved together; see
    `stacks_by_default`. Otherwise they take turns with all devices. With `shard`, which counts from 1, only the runs of
    that item of `program.shards` are trained. Other shards may run at the same time, but the whole study may not.
    """
    parts = study.runs[0].config.sharding.parallel_runs
    for field, value in (("--stack_runs", stack_runs), ("config.sharding.parallel_runs", parts)):
        if value and hosts.count() > 1:
            raise ConfigError(field, value, f"must be left out where {hosts.count()} processes do a run")
    specs = study.runs if shard is None else _shard(study, shard)
    hosts.check_same({"--workdir": str(workdir), "config.sweep": [spec.name for spec in specs]})
    with contextlib.ExitStack() as held:

        def begin() -> list[str]:
            workdirs.refuse_links(workdir)
            if left(specs, workdir):
                divide_cpu(study)
            held.enter_context(workdirs.lock(workdir, shared=shard is not None))
            if shard is not None:
                held.enter_context(workdirs.lock(workdir / "parts" / str(shard)))
            (workdir / "members").mkdir(exist_ok=True)
            waiting = left(specs, workdir)
            for spec in waiting:
                if sums_path(workdir, spec).exists():
                    set_aside(sums_path(workdir, spec), workdir / "damaged")
            _check_texts(study, waiting, workdir)
            return [spec.name for spec in waiting]

        wanted = hosts.on_leader(begin)
        remaining = [spec for spec in specs if spec.name in wanted]
        report = functools.partial(_report, study, workdir, shard)
        try:
            if remaining:
                _train(remaining, len(specs), workdir, launched, stack_runs)
        except BaseException as error:  # also of those that are done when a signal stops it
            if hosts.is_leader():
                report()
                if isinstance(error, ConfigError):
                    _remove_unused(workdir)
            raise
        hosts.on_leader(report)
    hosts.on_leader(lambda: study_report.print_summary(workdir))


def _shard(study: Study, number: int) -> list[RunSpec]:
    from posenc_jax.runs.program import shards

    found = shards(study.runs)
    if not 1 <= number <= len(found):
        raise ConfigError("--shard", number, f"must be from 1 to {len(found)}, the programs of this study")
    return found[number - 1]


def left(specs: Sequence[RunSpec], workdir: Path) -> list[RunSpec]:
    """Runs that are not evaluated yet, or whose members/NAME.npz is damaged."""
    return [spec for spec in specs if read_run(workdir, spec) is None]


def divide_cpu(study: Study) -> None:
    """Set the number of CPU devices so that every run can divide its batches over them. Raises ConfigError."""
    from posenc_jax.distributed import sharding

    training = [spec.config.training for spec in study.runs]
    rows = math.gcd(*(own.batch_size // own.grad_accum_steps for own in training))
    sharding.divide_cpu(min(own.cpu_devices for own in training), rows)


def _check_texts(study: Study, waiting: Sequence[RunSpec], workdir: Path) -> None:
    """Raise WorkdirError if runs that are compared were trained on different texts."""
    texts: dict[str, dict[str, Any]] = {}
    for spec in study.runs:
        found, folder = read_run(workdir, spec), _folder(workdir, spec)
        record = found[2] if found else workdirs.read(folder) if (folder / "config.json").exists() else None
        if record is not None:
            texts.setdefault(_text_of(spec), {})[spec.name] = record
    for spec in {_text_of(spec): spec for spec in waiting}.values():
        here = {"data": {"fingerprint": _fingerprint(spec.config)}}
        here["versions"] = {"python": platform.python_version()}
        texts.setdefault(_text_of(spec), {})["this machine"] = here
    for records in texts.values():
        workdirs.check_same_text(records)


def _text_of(spec: RunSpec) -> str:
    """A hash of the settings that determine the text and its tokens, or the task."""
    return sha256_of([{**plain(spec.config.data), "cache_dir": ""}, plain(spec.config.task)])


def _fingerprint(config: RunConfig) -> str:
    """The checksum of the text of a run, or of its task."""
    if config.task.name:
        return config.task.fingerprint
    from posenc_jax.runs import sources

    return sources.prepare_text(config).fingerprint


def _folder(workdir: Path, spec: RunSpec) -> Path:
    return workdir / "runs" / spec.name


def _train(remaining: Sequence[RunSpec], total: int, workdir: Path, launched: float, stack_runs: bool | None) -> None:
    """Train the remaining runs of `total`, and keep what is measured of each."""
    from posenc_jax.runs.driver import Driver
    from posenc_jax.runs.program import groups, program_key
    from posenc_jax.runs.train import NonFiniteLoss

    def stack_of(spec: RunSpec) -> Any:
        stacked = stacks_by_default(spec.config) if stack_runs is None else stack_runs
        return program_key(spec.config) if stacked and not (spec.parent or spec.config.init_from) else spec.name

    driver, console, begun, count = Driver(functools.partial(_folder, workdir)), Console(), time.monotonic(), 0
    for stack in groups(remaining, stack_of):
        driver.train_stack(stack, workdir / "runs", launched=launched if not count else time.monotonic())
        for spec in stack:
            line = f"run {total - len(remaining) + count + 1} of {total}: {spec.variant}, seed {spec.config.seed}"
            if count:
                line += f"; about {clock((time.monotonic() - begun) / count * (len(remaining) - count))} left"
            console.print(Text(line, "bold"), soft_wrap=True)
            stopped = ""
            try:
                driver.complete(spec, launched=launched if not count else time.monotonic())
            except NonFiniteLoss as error:
                stopped = str(error)
                console.print(Text(f"{spec.variant}, seed {spec.config.seed}: {stopped}"), soft_wrap=True)
            if hosts.is_leader():
                _keep(workdir, spec, stopped)
            count += 1


def stacks_by_default(config: RunConfig) -> bool:
    """Whether runs of a program are trained at the same time by default.

    They are if the settings give a number of parts. They also are on accelerators, unless the settings shard the model
    or there are several processes, none of which could read the states of all runs.
    """
    import jax

    undivided = config.sharding.fsdp * config.sharding.tensor == 1 and hosts.count() == 1
    return config.sharding.parallel_runs > 0 or (undivided and jax.devices()[0].platform != "cpu")


def _keep(workdir: Path, spec: RunSpec, stopped: str) -> None:
    """Write members/NAME.npz: the measurements of a run, or the reason why it, or its parent, `stopped`."""
    folder = _folder(workdir, spec)
    if not (folder / "config.json").exists():
        folder = _folder(workdir, spec.root)
    measured, documents, record = ({}, (), workdirs.read(folder)) if stopped else read_sums(folder / "windows.npz")
    record = record | {"tokens_per_second": _speed(folder)} | ({"stopped": stopped} if stopped else {})
    write_sums(sums_path(workdir, spec), measured, documents, record)


def _remove_unused(workdir: Path) -> None:
    """Remove the folder of a study if it holds only lock files."""
    ours = {path.name for path in workdir.iterdir()} <= {"lock", "members", "runs", "parts"}
    if ours and not any(path.is_file() and path.name != "lock" for path in workdir.rglob("*")):
        shutil.rmtree(workdir, ignore_errors=True)


def sums_path(workdir: Path, spec: RunSpec) -> Path:
    """The file in which a study keeps the measurements of a run."""
    return workdir / "members" / f"{spec.name}.npz"


def read_run(workdir: Path, spec: RunSpec) -> tuple[WindowSums, tuple[str, ...], dict[str, Any]] | None:
    """Measurements of a run, the documents of its windows, and its record; None if missing or damaged."""
    path = sums_path(workdir, spec)
    try:
        found = read_sums(path, spec.config)
        with damaged_if_invalid(path):
            check_form(found[2], RECORD)
        return found
    except (FileNotFoundError, DamagedError):
        return None


def _report(study: Study, workdir: Path, shard: int | None) -> None:
    """Write the tables and the report, if they are out of date."""
    with contextlib.nullcontext() if shard is None else workdirs.lock(workdir / "parts", wait=True):
        if _has_news(study, workdir):
            _write_tables(study, workdir)


def _has_news(study: Study, workdir: Path) -> bool:
    """Whether the report is out of date, or a table is damaged. Damaged tables are moved aside."""
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
    """Checksums of the files from which the report is made."""
    paths = [study_report.discussion(workdir), *(sums_path(workdir, spec) for spec in study.runs)]
    return {path.relative_to(workdir).as_posix(): sha256(path) for path in paths if path.exists()}


def _write_tables(study: Study, workdir: Path) -> None:
    """Write the tables and the report of the runs that are complete. Raises NonFiniteLoss if none is."""
    # These imports load jax, which is not needed to show a finished study.
    from posenc_jax.evaluation.pooling import Pool
    from posenc_jax.evaluation.run_results import result_rows
    from posenc_jax.runs.train import NonFiniteLoss

    sources, rows, by_seed = _sources(study, workdir), [], []
    measured: dict[str, dict[int, WindowSums]] = {}
    windows: dict[tuple[str, ...], str] = {}  # the name of a run for each list of documents
    for spec in study.runs:
        if found := read_run(workdir, spec):
            own, read, record = found
            rows.append(_row(spec, record))
            results = result_rows(spec.config, own, read)
            by_seed += [replace(row, encoding=spec.variant) for row in results]
            if own:
                measured.setdefault(spec.variant, {})[spec.config.seed] = own
                windows[read] = spec.name
    write_rows(workdir / "members.csv", MemberRow, rows)
    if not measured:
        raise NonFiniteLoss(f"no run ended well; {workdir / 'members.csv'} says how each did")
    if len(windows) > 1:
        names = " and ".join(windows.values())
        raise workdirs.WorkdirError(f"workdir {workdir} holds members measured on different documents: {names}")
    config = study.runs[0].config
    (documents,) = windows
    evaluation = config.evaluation
    options = {"resamples": evaluation.resamples, "num_depths": evaluation.retrieval_depths}
    pool = Pool(study.name, measured, documents, config.trained_size, **options)
    results = pool.results(study.baseline)
    write_results(workdir / "results.csv", results)
    write_results(workdir / "by_seed.csv", by_seed)
    write_rows(workdir / "ranks.csv", Rank, pool.ranks(results))
    write_rows(workdir / "bases.csv", Base, _bases(study))
    groups = {spec.variant: spec.group for spec in study.runs}
    command = shlex.join(["python", *sys.argv])
    costs = Path(study.costs) if study.costs else None
    study_report.write_report(workdir, study.question, command, groups, len(study.runs), costs)
    files = {name: sha256(workdir / name) for name in TABLES}
    write_sealed(workdir / workdirs.COMPLETE, {"sources": sources, "files": files})


def _bases(study: Study) -> Iterator[Base]:
    """Predictions of theory for the bases in the study, for RoPE on all channels without a scaling rule."""
    from posenc_jax.encodings import rope_theory

    for variant, (spec, *_) in study.variants.items():
        config, own = spec.config, spec.config.encoding.hyperparameters
        plain_rope = getattr(own, "scaling", None) == "none" and own.fraction == 1
        if plain_rope and isinstance(config.model, TransformerConfig):
            width, first, length = config.model.head_dim, config.pretrained_length, config.training.length
            pretrained_base = (spec.parent or spec).config.encoding.hyperparameters.base
            critical = rope_theory.critical_dimension(width, pretrained_base, first)
            bound = rope_theory.extrapolation_bound(width, pretrained_base, first, own.base, length)
            attended = rope_theory.attended_distance(width, own.base, config.evaluation.lengths[-1])
            yield Base(variant, width, own.base, critical, bound, attended, *rope_theory.small_bases(length))


def _speed(workdir: Path) -> float | None:
    """Median training throughput over the logged steps, in tokens per second; None if there are none."""
    lines = read_log(workdir / "metrics.jsonl").entries
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return statistics.median(speeds) if speeds else None


def _row(spec: RunSpec, record: Mapping[str, Any]) -> MemberRow:
    starts = record["sessions"]
    versions = [[f"{name} {version}" for name, version in start["versions"].items() if version] for start in starts]
    return MemberRow(
        variant=spec.variant,
        seed=spec.config.seed,
        run=spec.name,
        parameters=record["parameters"],
        flops_per_token=flops.per_token(spec.config),
        tokens_per_second=record["tokens_per_second"],
        device=_distinct(start["device"] for start in starts),
        git_revision=_distinct(start["git_revision"] or "unknown" for start in starts),
        versions=_distinct(map(", ".join, versions)),
        windows_asked=record["windows"]["asked"],
        windows=record["windows"]["found"],
        documents=record["windows"]["documents"],
        stopped=str(record.get("stopped", "")),
    )


def _distinct(texts: Iterable[str]) -> str:
    """The distinct texts, joined."""
    return "; ".join(dict.fromkeys(texts))
