"""Compares any complete runs and studies in one table.

python -m posenc_jax.compare runs/A runs/B
python -m posenc_jax.compare experiments/results/length_extrapolation runs/C --baseline=rope
python -m posenc_jax.compare runs/A runs/B --metric=tail_bits_per_byte --latex > table.tex

Runs that differ only in their seeds are averaged, as in a study. Differences are to the baseline, which is the first
variant by default, on the same windows and seeds. Variants that were measured on other windows have no differences.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from posenc_jax import command
from posenc_jax.evaluation.pooling import Pool
from posenc_jax.evaluation.window_sums import WindowSums, read_sums
from posenc_jax.files import sha256_of
from posenc_jax.identity import RESUMABLE
from posenc_jax.reporting.tables import Table, extrapolation_table
from posenc_jax.results import ACCURACIES, METRICS, MemberRow, Result, by_curve, csv_text, read_rows
from posenc_jax.schema import RENAMED, ConfigError, flat
from posenc_jax.untrusted import check_form, damaged_if_invalid, printable

SHOWN = ("prefix_bits_per_byte", "difference_bits_per_byte", "context_gain_bits_per_byte", "passkey_recall")
SHOWN += ACCURACIES
# Settings that change what a metric means. A model that is not causal is scored on masked tokens.
PROTOCOL = ("evaluation.tail", "evaluation.copy_chunk", "evaluation.retrieval_by", "evaluation.retrieval_depths")
PROTOCOL += ("model.causal",)
# Runs that differ only in these settings are of one variant.
FREE = {"name", "seed", "init_from", "data.tokenizer", *RESUMABLE} - {"training.duration"}
FORMS = {"markdown": "print Markdown", "latex": "print LaTeX, for booktabs", "csv": "print rows as in results.csv"}
RECORD = {
    "config": {
        "seed": int,
        "encoding": {"name": str},
        "model": {"architecture": str},
        "training": {"length": int},
        "evaluation": {"lengths": [int], "tail": int, "resamples": int},
    },
    "data": {"name": str, "fingerprint": str},
}


@dataclass(frozen=True)
class Measured:
    """What a run measured. Runs with the same `variant` differ only in their seeds."""

    folder: Path  # of the run or of its study
    variant: str
    sums: WindowSums
    documents: tuple[str, ...]  # the document of each window
    settings: Mapping[str, Any]  # by today's names, with dots
    text: tuple[str, str]  # name and fingerprint of the tokens

    @property
    def train_length(self) -> int:
        """Tokens of context or, of a task, the largest size in training."""
        fields = ("task.max_size", "training.pretrained_length", "training.length")
        return next(self.settings[field] for field in fields if self.settings.get(field))

    @property
    def windows(self) -> tuple[int, tuple[str, ...]]:
        """Runs on the same text with the same value have the same windows."""
        return max(self.settings["evaluation.lengths"], default=0), self.documents


def compared(folders: Sequence[Path], baseline: str = "") -> tuple[list[Result], list[str]]:
    """The results of all variants with their differences to the baseline, and notes on how the variants differ.

    Args:
      folders: folders of complete runs and of studies.
      baseline: name of a variant; "" is the first one.

    Raises:
      ConfigError: a folder is of neither, the runs cannot be compared, or no variant is named `baseline`.
      DamagedError, FormatError, OSError: a file cannot be read.
    """
    runs = _named([run for folder in folders for run in _read(folder)])
    if not runs:
        raise ConfigError("RUN", ", ".join(map(str, folders)), "must have a run whose loss was finite")
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    names = list(dict.fromkeys(run.variant for run in runs))
    baseline = baseline or names[0]
    if baseline not in names:
        raise ConfigError("--baseline", baseline, f"must be one of: {', '.join(names)}", names)
    first = next(run for run in runs if run.variant == baseline)
    options = first.settings["evaluation.resamples"], first.settings.get("evaluation.retrieval_depths", 1)
    results: list[Result] = []
    for windows in dict.fromkeys(run.windows for run in runs):
        variants: dict[str, dict[int, WindowSums]] = {}
        for run in (run for run in runs if run.windows == windows):
            seeds, seed = variants.setdefault(run.variant, {}), run.settings["seed"]
            if seed in seeds:
                raise ConfigError("RUN", str(run.folder), f"repeats {run.variant} with seed {seed}; give it once")
            seeds[seed] = run.sums
        results += Pool("comparison", variants, windows[1], first.train_length, *options).results(baseline)
    return results, list(_notes(first, {run.variant: run for run in runs}))


def _read(folder: Path) -> Iterator[Measured]:
    """The run or the runs of the study in a folder."""
    if (folder / "members.csv").exists():
        rows = [row for row in read_rows(folder / "members.csv", MemberRow) if not row.stopped]
        members = {folder / "members" / f"{row.run}.npz": row.variant for row in rows}
    elif (folder / "windows.npz").exists():
        members = {folder / "windows.npz": ""}
    else:
        raise ConfigError("RUN", str(folder), "must be the folder of a complete run or study")
    for path, name in members.items():
        if not path.is_file():
            raise ConfigError("RUN", str(folder), f"lacks {path.relative_to(folder)}, the measurements of a run")
        sums, documents, record = read_sums(path)
        with damaged_if_invalid(path):
            check_form(record, RECORD)
        config, data = record["config"], record["data"]
        architecture = config["model"]["architecture"]
        label = config["encoding"]["name"] if architecture == "transformer" else architecture
        yield Measured(folder, name or label, sums, documents, _settings(config), (data["name"], data["fingerprint"]))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    paths = ((field.rpartition("."), value) for field, value in flat(config).items())
    return {f"{section}{dot}{RENAMED.get(last, last)}": value for (section, dot, last), value in paths}


def _named(runs: Sequence[Measured]) -> list[Measured]:
    """The runs, with a folder in the names of different variants that would have the same name."""
    folders: dict[str, dict[str, Path]] = {}  # the first folder of each variant, by name and a hash of its settings
    for run in runs:
        folders.setdefault(run.variant, {}).setdefault(_hash(run), run.folder)
    names = [folder.name for folder in {run.folder for run in runs}]

    def named(run: Measured) -> Measured:
        own = folders[run.variant]
        folder = own[_hash(run)]
        place = folder.name if names.count(folder.name) == 1 else folder
        return replace(run, variant=f"{run.variant} ({place})") if len(own) > 1 else run

    return [named(run) for run in runs]


def _hash(run: Measured) -> str:
    return sha256_of({field: value for field, value in run.settings.items() if field not in FREE})


def _check_comparable(first: Measured, run: Measured) -> None:
    """Raise ConfigError if the metrics of two runs do not mean the same."""
    known = run.settings.keys() & first.settings.keys()
    pairs = {
        "text and tokenizer": (first.text, run.text),
        "training length": (first.train_length, run.train_length),
        **{name: (first.settings[name], run.settings[name]) for name in PROTOCOL if name in known},
    }
    for name, (expected, found) in pairs.items():
        if found != expected:
            raise ConfigError("RUN", str(run.folder), f"has {name} {found!r}, but {first.folder} has {expected!r}")


def _notes(first: Measured, runs: Mapping[str, Measured]) -> Iterator[str]:
    """The baseline, and what differs between it and a run of each other variant, beside the encoding."""
    yield f"Differences are to {first.variant}."
    for name, run in runs.items():
        if run.windows != first.windows:
            yield f"{name} was measured on other windows, so it has no difference."
    for field, value in first.settings.items():
        others: dict[str, list[str]] = {}
        for name, run in runs.items():
            if run.settings.get(field, value) != value and not _is_told(field, run, first):
                others.setdefault(str(run.settings[field]), []).append(name)
        if others:
            values = "; ".join(f"{other} for {', '.join(names)}" for other, names in others.items())
            yield f"{field} is {value}, but {values}."


def _is_told(field: str, run: Measured, first: Measured) -> bool:
    """Whether names, windows or the protocol tell of the difference in a setting, or it changes nothing."""
    section = field.partition(".")[0]
    same_encoding = run.settings["encoding.name"] == first.settings["encoding.name"]
    return field in FREE or section == "evaluation" or (section == "encoding" and not same_encoding)


def main(arguments: list[str]) -> None:
    """Raises the errors of `compared`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m posenc_jax.compare", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a complete run, or of a study")
    add("--baseline", default="", metavar="NAME", help="variant that the others are compared with; default: the first")
    add("--metric", action="append", metavar="NAME", help="of results.csv; may be repeated; default: the main ones")
    output = parser.add_mutually_exclusive_group()
    for name, what in FORMS.items():
        output.add_argument(f"--{name}", action="store_const", dest="form", const=name, help=what)
    args = parser.parse_args(arguments)
    for metric in args.metric or ():
        if metric not in METRICS:
            raise ConfigError("--metric", metric, f"must be one of: {', '.join(METRICS)}", METRICS)
    results, notes = compared(args.runs, args.baseline)
    if args.form == "csv":
        print(csv_text(Result, (row for row in results if not args.metric or row.metric in args.metric)), end="")
    else:
        for metric in args.metric or SHOWN:
            if by_curve(results, metric):
                _print(extrapolation_table(results, metric), metric, args.form)
    for note in notes:
        print(printable(note), file=sys.stderr if args.form else sys.stdout)


def _print(table: Table, metric: str, form: str | None) -> None:
    if form is None:
        table.print(Console())
        Console().print(METRICS[metric].reading, style="dim", markup=False, end="\n\n")
    else:
        print({"markdown": lambda: f"{table.title}:\n\n{table.markdown()}", "latex": table.latex}[form]())


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
