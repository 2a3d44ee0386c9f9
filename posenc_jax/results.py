"""Rows of results, the CSV files that hold them, and the curves, order and intervals of the rows of a metric."""

import csv
import io
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from posenc_jax.files import atomic_write_text
from posenc_jax.untrusted import DamagedError, printable, read_text

MAX_CELLS = 50_000  # the most curves times lengths in a file

Row = TypeVar("Row")


@dataclass(frozen=True)
class Result:
    """One row of results.csv: one number, its 95 % interval, and what it was measured on.

    `value` is None if the model cannot read the length (learned positions past their table). `ci_low` and `ci_high` are
    None without an interval, as for windows of one document. Lengths are in tokens. `tokens` is the number of scored
    tokens, or of the trials of a retrieval task. Gains and multiples such as "2x" refer to `train_length`, the length
    of the model's first training. In the results of a study, `seed` is None for a mean over seeds, and `encoding` is
    the name of the variant.
    """

    run: str
    encoding: str
    scaling: str
    seed: int | None
    train_length: int
    eval_length: int
    metric: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    tokens: int


@dataclass(frozen=True)
class Rank:
    """One row of ranks.csv: a curve at one length or distance, and its difference to the best curve there.

    The difference, `behind`, is over the same seeds and windows. `ci_low` and `ci_high` are the ends of its interval,
    or None without one. The intervals of one metric at one length hold for all its curves at once.
    """

    metric: str
    eval_length: int
    curve: str
    value: float
    behind: float
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True)
class MemberRow:
    """One row of members.csv: a run of the study.

    `stopped` is empty, or gives the reason for a non-finite loss. `windows_asked`, `windows` and `documents` describe
    the evaluation and are the same for all runs.
    """

    variant: str
    seed: int
    run: str
    parameters: int
    flops_per_token: float  # of a training step; see posenc_jax/training/flops.py
    tokens_per_second: float | None
    device: str
    git_revision: str
    versions: str
    windows_asked: int
    windows: int
    documents: int
    stopped: str


@dataclass(frozen=True)
class Base:
    """One row of bases.csv: theoretical properties of a variant's RoPE base. Sources: see encodings/rope_theory.py.

    `critical_dimension` is the number of channels that make at least one full turn in training. `extrapolation_bound`
    is T_extra, in tokens. `attended` is the largest distance up to which B_m >= 0, in tokens. Every pair rotates by at
    least a quarter, a half or a whole turn in training if the base is below `quarter_turn`, `half_turn` or
    `whole_turn`.
    """

    variant: str
    head_dim: int
    base: float
    critical_dimension: int
    extrapolation_bound: float
    attended: int
    quarter_turn: float
    half_turn: float
    whole_turn: float


@dataclass(frozen=True)
class Metric:
    """How a metric of results.csv is shown."""

    title: str
    reading: str
    decimals: int = 3
    is_gain: bool = False  # signed, and higher is better
    is_share: bool = False  # from 0 to 1, and higher is better


METRICS = {
    "prefix_bits_per_byte": Metric(
        "Bits per byte over the whole window",
        "Mean over positions [0, L), as when text is cut into windows of L tokens. Lower is better.",
    ),
    "difference_bits_per_byte": Metric(
        "Difference to the baseline, bits per byte",
        "Loss over the whole window minus that of the baseline, of the same seeds on the same windows: intervals of "
        "the difference itself. Lower is better.",
    ),
    "tail_bits_per_byte": Metric(
        "Bits per byte at the end of the window",
        "Mean over the last positions before L, where every token has almost L tokens of context, as with a sliding "
        "window. Lower is better.",
    ),
    "context_gain_bits_per_byte": Metric(
        "Context gain, bits per byte",
        "Loss of the last tokens of the window given only the training length of context, minus that given L tokens. "
        "Positive: the model uses the extra context. Zero: it survives it. Negative: it breaks. Higher is better.",
        is_gain=True,
    ),
    "prefix_change_bits_per_byte": Metric(
        "Change by the scaling rule, bits per byte",
        "Loss over the whole window under the rule minus that under none, on the same windows: intervals of the "
        "difference itself, much narrower than those of the two losses. Lower is better.",
    ),
    "copy_gain_bits_per_byte": Metric(
        "Text found again, bits per byte",
        "Text is shown a second time after so many tokens: its loss after text of another document was shown first, "
        "minus that after its own. Zero: the model finds nothing at that distance. Higher is better.",
        is_gain=True,
    ),
    "prefix_perplexity": Metric(
        "Perplexity per token over the whole window", "Mean over positions [0, L). Lower is better.", decimals=2
    ),
    "tail_perplexity": Metric(
        "Perplexity per token at the end of the window",
        "Mean over the last positions before L. Lower is better.",
        decimals=2,
    ),
    "long_perplexity": Metric(
        "Perplexity per key token (LongPPL)",
        "Only those of the last positions before L count that the model predicts much better with up to its training "
        "length of context than with an eighth of it. All scaling rules have the same key tokens, but each model has "
        "its own. Lower is better.",
        decimals=2,
    ),
}
RETRIEVAL = {  # the tasks of evaluation/retrieval_tasks.py, and what their answers are
    "passkey": "a number hidden in repeated sentences",
    "needle": "the value of a key in one hidden statement",
    "multi_key": "the value of one of several hidden keys",
    "multi_value": "all values of a key",
    "multi_query": "the values of several keys, one after another",
    "variable_tracking": "all variables with a value that is passed on",
    "common_words": "the most common words of a list",
    "frequent_words": "the most frequent words of a list",
}
METRICS |= {
    f"{task}_recall": Metric(
        f"Recall of {task.replace('_', ' ')}",
        f"Share of right answers to a question at the end of the text about {answer}. The interval is Wilson's. Higher "
        "is better.",
        decimals=2,
        is_share=True,
    )
    for task, answer in RETRIEVAL.items()
}
ANSWERS = {  # the cases of an evaluation on a task, which have names in its `cases`, and their samples
    "answers": "drawn as in training",
    "sparse_answers": "with few of the tokens that matter",
    "dense_answers": "with many of the tokens that matter",
}


def accuracy_names(case: str) -> tuple[str, str]:
    """The metrics of a case of ANSWERS: the share of the tokens that are right, and of the whole answers."""
    beginning = case.removesuffix("answers")
    return f"{beginning}accuracy", f"{beginning}exact_accuracy"


def _accuracies(case: str, drawn: str) -> dict[str, Metric]:
    by_token, exact = accuracy_names(case)
    title, told = by_token.replace("_", " ").capitalize(), f"samples of each size, {drawn}. Higher is better."
    named = {by_token: (title, "tokens of an answer"), exact: (f"{title} of whole answers", "answers")}
    return {
        metric: Metric(name, f"Share of the {what} that the model predicts, in {told}", is_share=True)
        for metric, (name, what) in named.items()
    }


for own in itertools.starmap(_accuracies, ANSWERS.items()):
    METRICS |= own
ACCURACIES = tuple(name for case in ANSWERS for name in accuracy_names(case))


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write results.csv completely or not at all. `read_results` restores floats exactly."""
    write_rows(path, Result, results)


def read_results(path: Path) -> list[Result]:
    """The rows of results.csv. Raises a DamagedError that names the file and, for a bad row, the line."""
    results = read_rows(path, Result)
    for line, row in enumerate(results, 2):
        if min(row.train_length, row.eval_length) < 1:
            raise DamagedError(f"{path}, line {line}: lengths must be at least 1")
    curves, lengths = ({(row.encoding, row.scaling) for row in results}, {row.eval_length for row in results})
    if len(curves) * len(lengths) > MAX_CELLS:
        raise DamagedError(f"{path} has {len(curves)} curves at {len(lengths)} lengths, too many to be shown")
    return results


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Write rows of a dataclass completely or not at all. `read_rows` restores floats exactly."""
    atomic_write_text(path, csv_text(kind, rows))


def csv_text(kind: type[Row], rows: Iterable[Row]) -> str:
    """The text of a CSV file with rows of a dataclass.

    Fields have the type str, int, bool, float, int | None or float | None. None is written as an empty text.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(kind))  # type: ignore[arg-type]
    for row in rows:
        items = astuple(row)  # type: ignore[arg-type]
        writer.writerow(_escape_formula(item) if isinstance(item, str) else item for item in items)
    return text.getvalue()


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a dataclass. Raises a DamagedError that names the file and, for a bad row, the line."""
    columns = {field.name: _PARSE[field.type] for field in fields(kind)}  # type: ignore[arg-type]
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header = next(reader, [])
        if header != list(columns):
            raise DamagedError(f"{path}: columns are {header}, must be {list(columns)}")
        return [kind(*(parse(text) for parse, text in zip(columns.values(), line, strict=True))) for line in reader]
    except DamagedError:
        raise
    except (ValueError, KeyError, csv.Error) as error:
        raise DamagedError(f"{path}, line {reader.line_num}: {error}") from None


def _escape_formula(text: str) -> str:
    """Put an apostrophe before a text that a spreadsheet would run as a formula.

    A text that begins with an apostrophe gets another one. Control characters are escaped as in `printable`.
    """
    text = printable(text)
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "'")) else text


def _integer(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise ValueError(f"{text[:20]!r} is no whole number of at most 18 digits")
    return int(text)


_PARSE: dict[Any, Any] = {
    str: lambda text: text.removeprefix("'"),
    int: _integer,
    float: float,
    bool: lambda text: {"True": True, "False": False}[text],
    int | None: lambda text: _integer(text) if text else None,
    float | None: lambda text: float(text) if text else None,
}


def by_curve(results: Sequence[Result], metric: str) -> dict[str, dict[int, Result]]:
    """The results of one metric, by curve and evaluation length. Lengths are in increasing order.

    Raises ValueError if a curve has two values at one length, for example of two seeds. Average them first.
    """
    names = curve_names(results)
    curves: dict[str, dict[int, Result]] = {}
    for row in sorted((row for row in results if row.metric == metric), key=lambda row: row.eval_length):
        name = names[row.encoding, row.scaling]
        other = curves.setdefault(name, {}).setdefault(row.eval_length, row)
        if other is not row:
            raise ValueError(
                f"two values of {metric} for {name!r} at length {row.eval_length}: "
                f"run {other.run!r} seed {other.seed}, run {row.run!r} seed {row.seed}"
            )
    return {name: curves[name] for name in names.values() if name in curves}


def curve_names(results: Sequence[Result]) -> dict[tuple[str, str], str]:
    """The name of each (encoding, scaling) in tables and figures, in order of first appearance in the results.

    The name is the scaling rule if all results are of one encoding with several rules. Otherwise it is the encoding,
    followed by the rule if there is one.
    """
    pairs = dict.fromkeys((result.encoding, result.scaling) for result in results)
    if named_by_scaling(results):
        return {pair: printable(pair[1]) for pair in pairs}
    return {pair: printable(pair[0] if pair[1] == "none" else f"{pair[0]} {pair[1]}") for pair in pairs}


def named_by_scaling(results: Sequence[Result]) -> bool:
    return len({row.encoding for row in results}) == 1 and len({row.scaling for row in results}) > 1


def train_length(results: Sequence[Result]) -> int:
    """The training length of the results, in tokens. Raises ValueError if there is not exactly one.

    Gains relative to different training lengths are not comparable.
    """
    lengths = {result.train_length for result in results}
    if len(lengths) != 1:
        raise ValueError(f"results must be of one training length, not of {sorted(lengths)}")
    return lengths.pop()


def interval(result: Result) -> tuple[float, float] | None:
    """The two ends of the interval of a result. None if it has no interval."""
    return None if result.ci_low is None or result.ci_high is None else (result.ci_low, result.ci_high)


def ranked(results: Iterable[Result | None], metric: str) -> list[Result]:
    """The results of one metric and length, best first. Leaves out those whose value is None or NaN."""
    valued = [(row.value, row) for row in results if row is not None and row.value is not None]
    order = sorted((pair for pair in valued if not math.isnan(pair[0])), key=lambda pair: pair[0])
    rising = METRICS[metric].is_gain or METRICS[metric].is_share
    return [row for _, row in (reversed(order) if rising else order)]
