"""Tables and report of a study, from the measurements of its runs."""

import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from posenc_jax.config import TransformerConfig
from posenc_jax.evaluation.measured import Measured, read_measured
from posenc_jax.files import read_sealed, sha256, write_sealed
from posenc_jax.reporting import study_report
from posenc_jax.reporting.metrics_log import read_log
from posenc_jax.results import Base, MemberRow, Rank, write_results, write_rows
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.finish import set_aside
from posenc_jax.runs.grid import RunSpec, Study
from posenc_jax.training import flops
from posenc_jax.untrusted import DamagedError, blaming, check_form

# The part of the record in members/NAME.npz that the report shows.
RECORD = workdirs.RECORD | {"versions": {"python": str}, "parameters": int, "tokens_per_second": int | float | None}
TABLES = ("results.csv", "by_seed.csv", "ranks.csv", "bases.csv", "members.csv")


def measured_path(workdir: Path, spec: RunSpec) -> Path:
    """The file in which a study keeps the measurements of a run."""
    return workdir / "members" / f"{spec.name}.npz"


def read_run(workdir: Path, spec: RunSpec) -> tuple[Measured, tuple[str, ...], dict[str, Any]] | None:
    """Measurements of a run, the documents of its windows, and its record; None if missing or damaged."""
    path = measured_path(workdir, spec)
    try:
        found = read_measured(path, spec.config)
        with blaming(path):
            check_form(found[2], RECORD)
        return found
    except (FileNotFoundError, DamagedError):
        return None


def has_news(study: Study, workdir: Path) -> bool:
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
    paths = [study_report.discussion(workdir), *(measured_path(workdir, spec) for spec in study.runs)]
    return {path.relative_to(workdir).as_posix(): sha256(path) for path in paths if path.exists()}


def write(study: Study, workdir: Path) -> None:
    """Write the tables and the report of the runs that are complete. Raises NonFiniteLoss if none is."""
    # These imports load jax, which is not needed to show a finished study.
    from posenc_jax.evaluation import extrapolation
    from posenc_jax.evaluation.pooling import Pool
    from posenc_jax.runs.train import NonFiniteLoss

    sources, rows, by_seed = _sources(study, workdir), [], []
    measured: dict[str, dict[int, Measured]] = {}
    windows: dict[tuple[str, ...], str] = {}  # the name of a run for each list of documents
    for spec in study.runs:
        if found := read_run(workdir, spec):
            own, read, record = found
            rows.append(_row(spec, record))
            results = extrapolation.results(spec.config, own, read)
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
    pool = Pool(study.name, measured, documents, config.pretrained_length, config.evaluation.resamples)
    results = pool.results(study.baseline)
    write_results(workdir / "results.csv", results)
    write_results(workdir / "by_seed.csv", by_seed)
    write_rows(workdir / "ranks.csv", Rank, pool.ranks(results))
    write_rows(workdir / "bases.csv", Base, bases(study))
    groups = {spec.variant: spec.group for spec in study.runs}
    command = shlex.join(["python", *sys.argv])
    costs = Path(study.costs) if study.costs else None
    study_report.write_report(workdir, study.question, command, groups, len(study.runs), costs)
    files = {name: sha256(workdir / name) for name in TABLES}
    write_sealed(workdir / workdirs.COMPLETE, {"sources": sources, "files": files})


def bases(study: Study) -> Iterator[Base]:
    """Predictions of theory for the bases in the study, for RoPE on all channels without a scaling rule."""
    from posenc_jax.encodings import rope_theory

    for variant, (spec, *_) in study.variants.items():
        config, own = spec.config, spec.config.encoding.hyperparameters
        plain_rope = getattr(own, "scaling", None) == "none" and own.fraction == 1
        if plain_rope and isinstance(config.model, TransformerConfig):
            width, first, length = config.model.head_dim, config.pretrained_length, config.training.length
            pretrained_base = (spec.parent or spec).config.encoding.hyperparameters.base
            yield Base(
                variant,
                width,
                own.base,
                rope_theory.critical_dimension(width, pretrained_base, first),
                rope_theory.extrapolation_bound(width, pretrained_base, first, own.base, length),
                rope_theory.attended_distance(width, own.base, config.evaluation.lengths[-1]),
                *rope_theory.small_bases(length),
            )


def speed(workdir: Path) -> float | None:
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
