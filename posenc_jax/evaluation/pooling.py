"""The results of a study: means over the seeds of a variant, and differences between variants, with intervals."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from posenc_jax.evaluation.run_results import accuracy_rows, effective_lengths, recall_rows
from posenc_jax.evaluation.statistics import Interval, differences_to_first, perplexity_interval, ratio_interval
from posenc_jax.evaluation.window_sums import Key, Recall, WindowSums
from posenc_jax.results import ANSWERS, RETRIEVAL, Rank, Result, curve_names, ranked

Seeds = Mapping[int, WindowSums]  # the measurements of a variant, by seed


class Pool:
    """The measurements of all variants of a study, all on the same windows.

    Args:
      study: name of the study in the rows.
      variants: the measurements of each variant, by seed. Seeds may be missing. Variants without seeds are left out.
      documents: the document of each window.
      train_length: context length in tokens of the first training of all variants, and the short context of the gains.
      resamples: number of bootstrap draws for each interval.
      num_depths: number of depths in retrieval tasks.
    """

    def __init__(
        self,
        study: str,
        variants: Mapping[str, Seeds],
        documents: Sequence[str],
        train_length: int,
        resamples: int,
        num_depths: int = 1,
    ):
        self._study, self._train_length, self._num_depths = study, train_length, num_depths
        self._documents, self._resamples = documents, resamples
        self._variants = {name: seeds for name, seeds in variants.items() if seeds}

    def results(self, baseline: str) -> list[Result]:
        """Every metric over the seeds of each variant, and the difference of its loss to the baseline, if any."""
        rows, others = [], self._variants.get(baseline)
        for name, seeds in self._variants.items():
            for key in next(iter(seeds.values())):
                if key.metric in RETRIEVAL or key.metric in ANSWERS:
                    rows += self._recall(name, key, seeds)
                    continue
                row = self._row(name, key, key.metric, seeds)
                if row.value is None or not math.isnan(row.value):  # NaN: no seed has a key token at this length
                    rows.append(row)
                if key.metric == "prefix" and others and (name, key.scaling) != (baseline, "none"):
                    rows.append(self._row(name, key, "difference", seeds, others))
        return rows + effective_lengths(rows)

    def ranks(self, results: Sequence[Result]) -> Iterator[Rank]:
        """The curves in order for each loss and gain, at each length: best first, with the difference to the best.

        The intervals of one metric at one length hold for all pairs of curves at once; see `differences_to_first`.
        """
        names = curve_names(results)
        for metric in ("prefix", "tail", "context_gain", "copy_gain"):
            rows = [row for row in results if row.metric == f"{metric}_bits_per_byte" and row.value is not None]
            for length in sorted({row.eval_length for row in rows}):
                order = ranked([row for row in rows if row.eval_length == length], f"{metric}_bits_per_byte")
                for row, (behind, low, high) in zip(order, self._to_best(order, metric, length), strict=True):
                    if row.value is not None and not math.isnan(behind):  # NaN: no seed in common with the best
                        curve = names[row.encoding, row.scaling]
                        yield Rank(f"{metric}_bits_per_byte", length, curve, row.value, behind, low, high)

    def _to_best(self, order: Sequence[Result], metric: str, length: int) -> list[Interval]:
        """The difference of each curve to the first one, over the seeds that both have."""
        seeds = sorted({seed for own in self._variants.values() for seed in own})
        nats, num_bytes = np.zeros((2, len(order), len(seeds), len(self._documents)))
        for i, row in enumerate(order):
            for j, seed in enumerate(seeds):
                sums = self._variants[row.encoding].get(seed, {}).get(Key(row.scaling, metric, length))
                if sums is not None:
                    nats[i, j], num_bytes[i, j] = sums.nats, sums.bytes
        return differences_to_first(nats / math.log(2), num_bytes, self._documents, resamples=self._resamples)

    def _row(self, variant: str, key: Key, metric: str, seeds: Seeds, others: Seeds | None = None) -> Result:
        """Bits per byte of a variant, or its difference to the unscaled `others`, over the seeds that both have.

        For the metric "long" it is the perplexity. All seeds read the same windows. The value is None if a seed could
        not read that length.
        """
        chosen = [seed for seed in seeds if others is None or seed in others]
        sums = _sums(seeds, chosen, key)
        less = sums if others is None else _sums(others, chosen, key._replace(scaling="none"))
        (value, low, high), tokens = (None, None, None), 0
        if sums and less:
            nats, num_bytes, counts = (np.stack(own) for own in zip(*sums, strict=True))
            if others is not None:
                nats = nats - np.stack([other.nats for other in less])
            options = {"documents": self._documents, "resamples": self._resamples}
            if metric == "long":
                value, low, high = perplexity_interval(nats, counts, **options)
            else:
                value, low, high = ratio_interval(nats / math.log(2), num_bytes, **options)
            tokens = int(counts.sum())
        unit = "perplexity" if metric == "long" else "bits_per_byte"
        return self._row_at(variant, key)(f"{metric}_{unit}", value, low, high, tokens)

    def _recall(self, variant: str, key: Key, seeds: Seeds) -> Iterator[Result]:
        """The recall of a retrieval task, or the accuracy of a task, over the trials of all seeds.

        All seeds are asked the same questions.
        """
        own = _sums(seeds, list(seeds), key)
        recall = Recall(*map(np.concatenate, zip(*own, strict=True))) if own else None
        if key.metric in ANSWERS:
            return accuracy_rows(self._row_at(variant, key), key.metric, recall)
        return recall_rows(self._row_at(variant, key), key.metric, recall, self._num_depths)

    def _row_at(self, variant: str, key: Key) -> Callable[..., Result]:
        return functools.partial(Result, self._study, variant, key.scaling, None, self._train_length, key.length)


def _sums(seeds: Seeds, chosen: Sequence[int], key: Key) -> list[Any] | None:
    found = [sums for seed in chosen if (sums := seeds[seed].get(key)) is not None]
    return found if found and len(found) == len(chosen) else None
