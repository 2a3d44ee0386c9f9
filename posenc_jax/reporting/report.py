"""The report of a run (report.md) and its summary on the terminal."""

import logging
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from posenc_jax.files import atomic_write_text
from posenc_jax.reporting import figures, task_report
from posenc_jax.reporting.findings import bold, findings, rules_ranking, without_intervals
from posenc_jax.reporting.metrics_log import read_log
from posenc_jax.reporting.recall_figures import recall_figures
from posenc_jax.reporting.tables import escape_markdown, extrapolation_table
from posenc_jax.reporting.weights_and_biases import Board
from posenc_jax.results import (
    ACCURACIES,
    METRICS,
    Result,
    by_curve,
    curve_names,
    read_results,
    train_length,
)
from posenc_jax.schema import flat
from posenc_jax.untrusted import check_form, damaged_if_invalid, printable, read_json

logger = logging.getLogger(__name__)

MAIN_METRIC = "prefix_bits_per_byte"
GAIN_METRIC = "context_gain_bits_per_byte"
COPY_METRIC = "copy_gain_bits_per_byte"
PASSKEY_METRIC = "passkey_recall"
FIGURES = {  # metric: file and caption
    MAIN_METRIC: ("extrapolation", "Bits per byte over evaluation length"),
    GAIN_METRIC: ("context_gain", "What context past the training length is worth"),
    COPY_METRIC: ("copy_gain", "How much of a text is found again, over the tokens since its first showing"),
    "by_position_bits_per_byte": ("loss_by_position", "Loss by position, in windows of the longest length"),
} | {name: (name, f"{METRICS[name].title}, over the size of the samples") for name in ACCURACIES}
SHORT_METRICS = (MAIN_METRIC, GAIN_METRIC, PASSKEY_METRIC, *ACCURACIES)  # on the terminal
WINDOWS = {"asked": int, "found": int, "documents": int}
RECORD = {  # the parts of a run's record that the report shows
    "config": {
        "name": str,
        "seed": int,
        "encoding": {"name": str},
        "model": {"architecture": str},
        "training": {"length": int, "batch_size": int, "duration": str},
        "evaluation": {"tail": int, "lengths": [int], "copy_distances": list},
    },
    "data": {"name": str, "fingerprint": str, "splits": {str: {str: int}}},
    "windows": WINDOWS,
    "parameters": int,
    "command": str,
    "device": str,
    "versions": dict,
    "git_revision": str | None,
    "sessions": list,
}
FEW_DOCUMENTS = 10
SHOWN_DIGITS = 12  # of a sha256
TABLES_READING = (
    "Each cell is a value ± half the width of its 95 % interval, by the bootstrap over documents. The best of several "
    "is bold. Intervals that overlap leave open which of two is better; they do not show that the two are equal."
)


def write_report(workdir: Path, spectra: Mapping[str, np.ndarray] | None = None, boards: Sequence[Board] = ()) -> Path:
    """Write the figures of a run and then its report.md. Returns the path of the report.

    Reads config.json, results.csv and metrics.jsonl. The report names damaged lines of metrics.jsonl. `spectra` maps
    scaling rules to their inverse frequencies [d/2] in radians per token, for encodings that rotate. The figures are
    also written to the `boards`.
    """
    record, results, metrics = _read(workdir)
    with damaged_if_invalid(workdir / "config.json"):
        question, origin = _question(record, results), list(_origin(record))
        evidence = Evidence.of(record["windows"])
    step = metrics[-1]["step"] if metrics else 0
    images = save_figures(workdir, _figures(results, metrics, spectra), boards, step)
    sections = [
        f"# {escape_markdown(record['config']['name'])}",
        question,
        *findings_section(evidence, findings(results), [] if without_intervals(results) else rules_ranking(results)),
        "## Tables",
        task_report.TABLES if task_report.task_of(record) else TABLES_READING,
        *tables(results, record["config"]["evaluation"]["tail"]),
        "## Figures",
        *images,
        "## Setup",
        labelled(_setup(record, metrics)),
    ]
    return write_sections(workdir, sections, record["command"], origin)


def write_sections(workdir: Path, sections: Sequence[str], command: str, origin: Iterable[tuple[str, str]]) -> Path:
    """Write report.md, with the command and the origin of the results at its end. Returns its path."""
    made = "## How it was made", textwrap.indent(printable(command), "    "), labelled(origin)
    path = workdir / "report.md"
    atomic_write_text(path, "\n\n".join(section.rstrip() for section in (*sections, *made)) + "\n")
    return path


@dataclass(frozen=True)
class Evidence:
    """The numbers of test windows asked for and found, and the number of their documents.

    Samples of a task are windows without documents.
    """

    asked: int
    found: int
    documents: int

    @classmethod
    def of(cls, record: Mapping[str, int]) -> "Evidence":
        """The evidence in `windows` of a run's record."""
        return cls(record["asked"], record["found"], record["documents"])

    def __str__(self) -> str:
        if not self.documents:
            return f"{self.found:,} samples of each size for each model"
        plural = "document" if self.documents == 1 else "documents"
        return f"{self.asked} windows asked for, {self.found} found, from {self.documents} {plural}"

    @property
    def warning(self) -> str:
        """A warning if there are few documents, else "".

        Intervals are over documents. In simulations with normal losses, 95 % intervals contain the true mean in 94 % of
        cases with 20 documents, 93 % with 6, 75 % with 3 and 50 % with 2. Real losses are not normal. With few
        documents, intervals cannot account for this.
        """
        if self.documents == 1:
            return f"{self}: there are no intervals, and nothing can be said about other texts."
        if 0 < self.documents < FEW_DOCUMENTS:
            return f"{self}: so few documents say little about other texts, and the intervals are rough."
        return ""


def findings_section(evidence: Evidence, found: Iterable[str], rankings: Iterable[str] = ()) -> list[str]:
    """Rankings and findings, after a warning if there are few documents. The findings tell if there is only one."""
    warning = [evidence.warning] if evidence.documents > 1 and evidence.warning else []
    return ["## What the numbers say", *warning, *rankings, "\n".join(f"- {finding}" for finding in found)]


def save_figures(
    workdir: Path, drawn: Iterable[tuple[str, str, Figure]], boards: Iterable[Board], step: int
) -> list[str]:
    """Write (file name, caption, figure) triples to `figures/` and the boards. Returns Markdown for each figure."""
    (workdir / "figures").mkdir(exist_ok=True)
    images = []
    for name, caption, figure in drawn:
        figures.save(figure, workdir / "figures" / name)
        for board in boards:
            board.figure(f"figures/{name}", figure, step)
        images.append(f"![{caption}](figures/{name}.png)\n\n*{caption}*")
    return images


def print_summary(workdir: Path, console: Console | None = None) -> None:
    """Print the main tables of a complete run, an explanation of each, and the paths of its other results."""
    record = read_json(workdir / "config.json")
    with damaged_if_invalid(workdir / "config.json"):
        check_form(record, {"windows": WINDOWS})
        weights = initial_weights(record)
    console = console or Console()
    if weights:
        console.print(Text(f"weights: {weights}"), soft_wrap=True)
    print_outcome(workdir, SHORT_METRICS, Evidence.of(record["windows"]).warning, console)


def initial_weights(record: Mapping[str, Any]) -> str:
    """The model that a run started from, with the first digits of the checksum of its weights; "" for random weights.

    Raises ValueError for a record of another form.
    """
    own = record.get("initial_weights")
    if own is None:
        return ""
    check_form(own, {"source": str, "sha256": str}, "initial_weights")
    return printable(f"{own['source']} (sha256 {own['sha256'][:SHOWN_DIGITS]})")


def print_outcome(workdir: Path, metrics: Iterable[str], warning: str, console: Console) -> None:
    """Print the tables of the metrics that results.csv has, a warning, and the paths of the other results.

    Raises DamagedError.
    """
    with damaged_if_invalid(workdir / "results.csv"):
        results = read_results(workdir / "results.csv")
        shown = [(extrapolation_table(results, metric), metric) for metric in metrics if by_curve(results, metric)]
    for table, metric in shown:
        table.print(console)
        console.print(Text(METRICS[metric].reading, "dim"), end="\n\n")
    if warning:
        console.print(Text(warning), soft_wrap=True)
    for label, name in (("report", "report.md"), ("numbers", "results.csv"), ("curves", "tensorboard")):
        console.print(Text(f"{label}: {workdir / name}"), soft_wrap=True)


def tables(results: Sequence[Result], tail: int | None = None) -> Iterator[str]:
    """A table with its title and an explanation, for each metric. `tail` is the number of last tokens of a window."""
    for name, metric in METRICS.items():
        if by_curve(results, name):
            reading = metric.reading.replace("the last", f"the last {tail}") if tail is not None else metric.reading
            yield f"### {metric.title}\n\n{reading}\n\n{extrapolation_table(results, name).markdown()}"


def labelled(texts: Iterable[tuple[str, str]]) -> str:
    """A Markdown list of labels and texts."""
    return "\n".join(f"- {label}: {escape_markdown(text)}" for label, text in texts)


def _read(workdir: Path) -> tuple[dict[str, Any], list[Result], list[dict[str, Any]]]:
    record = read_json(workdir / "config.json")
    with damaged_if_invalid(workdir / "config.json"):
        check_form(record, RECORD)
    log = read_log(workdir / "metrics.jsonl")
    if log.lost:
        logger.warning("%s", log.lost)
        log.entries.append({"step": log.entries[-1]["step"] if log.entries else 0, "lost": log.lost})
    return record, read_results(workdir / "results.csv"), log.entries


def _figures(
    results: Sequence[Result], metrics: Sequence[Mapping[str, Any]], spectra: Mapping[str, np.ndarray] | None
) -> Iterator[tuple[str, str, Figure]]:
    """File name, caption and figure of each figure that has data."""
    for metric, named in FIGURES.items():
        if metric != COPY_METRIC and has_curve(results, metric):
            yield *named, figures.extrapolation_curve(results, metric)
    yield from recall_figures(results)
    if spectra:
        figure = figures.rotation_frequencies(spectra, train_length(results))
        yield "rotation_frequencies", "How often each pair of dimensions turns within the training length", figure
    if _series(metrics, "bits_per_byte"):
        yield "training", "Training and validation loss", figures.training_curve(metrics)


def has_curve(results: Sequence[Result], metric: str) -> bool:
    """Whether a metric was measured at several lengths. A loss may be of one."""
    lengths = {row.eval_length for row in results if row.metric == metric}
    return len(lengths) > 1 or bool(lengths and not METRICS[metric].is_share)


def _question(record: Mapping[str, Any], results: Sequence[Result]) -> str:
    config, weights = record["config"], initial_weights(record)
    architecture, trained = config["model"]["architecture"], config["training"]["length"]
    encoding = f"positional encoding **{escape_markdown(config['encoding']['name'])}**"
    if architecture != "transformer":
        subject = f"A recurrent language model ({bold(architecture)})"
    elif config["model"]["causal"]:
        subject = f"A language model with {encoding}"
    else:
        subject = f"An encoder, which predicts hidden tokens, with {encoding}"
    if task := task_report.task_of(record):
        return f"{subject} {task_report.question(task)}"
    longest = max(result.eval_length for result in results)
    question = f"{subject} was trained on windows of {trained} tokens. "
    pattern = config["model"].get("pattern", "E")
    if set(pattern) != {"E"}:
        sections = config.get("layers", {}).items()  # which the records of earlier runs do not have
        own = (f"; {x}: " + ", ".join(f"{k} {v}" for k, v in flat(section).items()) for x, section in sections)
        question += escape_markdown(f"Its layers follow the pattern {pattern}{''.join(own)}.") + " "
    if weights and config["training"]["duration"].startswith("0 "):
        question += f"This run only evaluates it, with the weights of {escape_markdown(weights)}. "
    elif weights:
        question += f"It started from the weights of {escape_markdown(weights)}. "
    question += f"How well does it read up to {longest} tokens"
    return question + (", and which scaling of its frequencies helps most?" if len(curve_names(results)) > 1 else "?")


def _setup(record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Labels and texts about the data, the model and the training."""
    config, data, task = record["config"], record["data"], task_report.task_of(record)
    encoding = ", ".join(f"{key} = {value}" for key, value in config["encoding"].items() if key != "name")
    yield "encoding", config["encoding"]["name"] + (f" ({encoding})" if encoding else "")
    yield "parameters", f"{record['parameters']:,}"
    if weights := initial_weights(record):
        yield "initial weights", weights
    yield "data", f"{data['name']}, fingerprint {data['fingerprint']}"
    for name, split in data["splits"].items():
        yield f"{name} split", ", ".join(f"{count:,} {unit}" for unit, count in split.items())
    longest = max(config["evaluation"]["lengths"], default=0)
    evidence = str(Evidence.of(record["windows"]))
    yield "evaluation", evidence if task else f"windows of {longest} tokens of the test split: {evidence}"
    if config["evaluation"]["copy_distances"] and record["windows"]["found"] == 1:
        yield "text found again", "not measured, as it needs a second window"
    tokens = _series(metrics, "tokens")
    if tokens:
        windows = "samples of at most" if task else "windows of"
        batch = f"batches of {config['training']['batch_size']} {windows} {config['training']['length']} tokens"
        yield "training", f"{tokens[-1]:,} tokens in {batch}, seed {config['seed']}"
    for label, key in (("training", "bits_per_byte"), ("validation", "validation_bits_per_byte")):
        if values := _series(metrics, key):
            yield f"final {label} loss", f"{values[-1]:.4f} bits per byte"
    if accuracies := _series(metrics, "validation_accuracy"):
        yield "final validation accuracy", f"{accuracies[-1]:.4f} of the tokens of an answer"
    if speeds := _series(metrics, "tokens_per_second"):
        yield "speed", f"{statistics.median(speeds):,.0f} tokens per second (median of the logged steps)"
    for lost in _series(metrics, "lost"):
        yield "log", lost


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [line[key] for line in metrics if key in line]


def _origin(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Labels and texts about the code and the machine."""
    yield "device", record["device"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    yield "git revision", record["git_revision"] or "unknown"
    sessions = record["sessions"]
    for number, session in enumerate(sessions, 1) if len(sessions) > 1 else ():
        yield f"start {number}", "; ".join(_session(session, sessions))


def _session(session: Mapping[str, Any], sessions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A start of the run: its steps, the settings that changed, and its code and machine if other starts differ."""
    yield f"from step {session['step']} of {session['total_steps']}"
    yield from (f"{field} changed from {old} to {new}" for field, (old, new) in session["changed"].items())
    if rates := session.get("learning_rates"):
        yield "the learning rate jumped from {:.3g} to {:.3g}, as in no run of one duration".format(*rates)
    for field in ("device", "git_revision"):
        if any(other[field] != session[field] for other in sessions):
            yield f"{field.replace('_', ' ')} {session[field] or 'unknown'}"
    for name, version in session["versions"].items():
        if any(other["versions"].get(name) != version for other in sessions):
            yield f"{name} {version}"
