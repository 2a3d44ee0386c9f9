"""The results of one run: rows of results.csv from sums over windows and from answers to retrieval and other tasks.

The recall of a retrieval task, and the accuracy of a task, is the mean share of right parts of an answer. Its 95 %
interval is Wilson's (1927), with one observation per trial. It is conservative for answers of several parts: their
shares vary at most as much as answers that are right or wrong as a whole.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from posenc_jax.config import RunConfig
from posenc_jax.evaluation.retrieval_tasks import depths
from posenc_jax.evaluation.statistics import perplexity_interval, ratio_interval, wilson_interval
from posenc_jax.evaluation.window_sums import Recall, WindowSums
from posenc_jax.results import ANSWERS, RETRIEVAL, Result, accuracy_names, interval

UNREAD = None, None, None  # the value and the interval of a length that the model cannot read
LEAST_RECALL = 0.9  # of the passkey, at lengths up to the effective length


def result_rows(config: RunConfig, measured: WindowSums, documents: Sequence[str]) -> list[Result]:
    """Rows of results.csv: bits per byte of every loss, perplexity per token of some, and retrieval.

    Key tokens have only the perplexity, and no row at a length without key tokens. `documents` names the document of
    each window. Intervals of losses are over documents.
    """
    options = {"documents": documents, "resamples": config.evaluation.resamples}
    rows = []
    for key, sums in measured.items():
        of_run = config.name, config.label, key.scaling, config.seed, config.trained_size, key.length
        row = functools.partial(Result, *of_run)
        if key.metric in RETRIEVAL:
            rows += recall_rows(row, key.metric, sums, config.evaluation.retrieval_depths)
            continue
        if key.metric in ANSWERS:
            rows += accuracy_rows(row, key.metric, sums)
            continue
        if key.metric == "long" and sums is not None and not sums.tokens.any():
            continue
        has_perplexity = key.metric in ("prefix", "tail", "long")
        bits, perplexity, tokens = UNREAD, UNREAD, 0
        if sums is not None:
            tokens = int(sums.tokens.sum())
            bits = ratio_interval(sums.nats / math.log(2), sums.bytes, **options)
            if has_perplexity:
                perplexity = perplexity_interval(sums.nats, sums.tokens, **options)
        if key.metric != "long":
            rows.append(row(f"{key.metric}_bits_per_byte", *bits, tokens))
        if has_perplexity:
            rows.append(row(f"{key.metric}_perplexity", *perplexity, tokens))
    return rows + effective_lengths(rows)


def recall_rows(row: Callable[..., Result], task: str, recall: Recall | None, num_depths: int) -> Iterator[Result]:
    """The recall over all trials, and at each depth. `row` makes a Result from its metric and the fields after it."""
    places = depths(task, num_depths)
    for i, depth in enumerate([None, *places] if places != [None] else [None]):
        metric = f"{task}_recall" if depth is None else f"{task}_recall_at_depth_{depth:.2f}"
        if recall is None:
            yield row(metric, *UNREAD, 0)
            continue
        _, right, items = recall if depth is None else Recall(*(x[i - 1 :: len(places)] for x in recall))
        if items.size:
            share = float((right / items).mean())
            yield row(metric, share, *wilson_interval(share, items.size), items.size)


def accuracy_rows(row: Callable[..., Result], case: str, answers: Recall | None) -> Iterator[Result]:
    """The mean share of right tokens of an answer, and the share of right answers, over all samples of a case.

    Intervals are Wilson's, as for recall.
    """
    by_token, exact = accuracy_names(case)
    if answers is None:
        yield from (row(metric, *UNREAD, 0) for metric in (by_token, exact))
        return
    _, right, items = answers
    for metric, shares in ((by_token, right / items), (exact, right == items)):
        share = float(shares.mean())
        yield row(metric, share, *wilson_interval(share, items.size), items.size)


def effective_lengths(results: Sequence[Result]) -> list[Result]:
    """The effective length of each curve that has the passkey task, in tokens, with its interval.

    It is the longest length up to which, at all measured lengths, the interval of the context gain is not below zero
    and the lower end of the passkey's recall is at least LEAST_RECALL. It is 0 if there is none. Past the training
    length it needs a context gain with an interval. It is also the lower end of its interval. The upper end is the
    longest length up to which nothing refutes it: the interval of the context gain is nowhere below zero, and that of
    the recall nowhere below LEAST_RECALL. Few trials thus give a wide interval.
    """
    curves: dict[tuple[str, str], dict[str, dict[int, Result]]] = {}
    for row in results:
        curves.setdefault((row.encoding, row.scaling), {}).setdefault(row.metric, {})[row.eval_length] = row
    found = []
    for own in curves.values():
        recalls, gains = own.get("passkey_recall", {}), own.get("context_gain_bits_per_byte", {})
        if recalls:
            shown, possible = _reached(recalls, gains, certain=True), _reached(recalls, gains, certain=False)
            ends = {"value": float(shown), "ci_low": float(shown), "ci_high": float(possible)}
            found.append(replace(recalls[max(recalls)], metric="effective_length", **ends))
    return found


def _reached(recalls: Mapping[int, Result], gains: Mapping[int, Result], *, certain: bool) -> int:
    """The longest length up to which recall and gain are high enough, for certain or possibly; 0 if there is none."""
    reached = 0
    for length, recall in sorted(recalls.items()):
        gain, found = gains.get(length), interval(recall)
        if found is None or found[0 if certain else 1] < LEAST_RECALL:
            break
        if length > recall.train_length:
            if gain is None:  # not measured at this length
                continue
            ends = interval(gain)
            if ends[1] < 0 if ends else certain:
                break
        reached = length
    return reached
