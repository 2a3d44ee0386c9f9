"""Tokens to windows: endless shuffled batches for training, and a fixed set of windows for evaluation."""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from posenc_jax.data.packing import PackedBatches, packed_tokens
from posenc_jax.data.tokens import Split
from posenc_jax.schema import ConfigError

log = logging.getLogger(__name__)

_THREADS = 2  # threads that create batches
_PREFETCH = 16  # batches created in advance


def training_batches(
    split: Split,
    *,
    length: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: np.ndarray | None = None,
    packed: bool = False,
) -> Iterator[np.ndarray]:
    """Endless batches of windows, int32 [batch_size, length + 1]: inputs and, one token later, targets.

    The batch of a step depends only on the arguments and the step, so a run can resume at any step. An epoch draws
    every window once, in a new order. The windows of a document start every `length` tokens, from an offset that is
    drawn again in each epoch. They never extend into another document. With `rows`, only these rows of each batch are
    created. Raises ConfigError.

    If `packed`, windows are cut from documents that follow one another, and batches are int32 [batch_size, 2,
    length + 1]: see `PackedBatches`.
    """
    source = PackedBatches if packed else _Batches
    source = source(split, length, batch_size, np.arange(batch_size) if rows is None else rows, seed)
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)
    return iter(grain.MapDataset.source(source)[start_step:].to_iter_dataset(options))


def epoch_tokens(split: Split, length: int, packed: bool = False) -> int:
    """The number of tokens in an epoch. Raises ConfigError if no document is long enough, and warns if most are not.

    If `packed`, documents of any length are used.
    """
    if packed:
        return packed_tokens(split, length)
    windows, sizes = _windows_per_document(split, length, "config.training.length"), np.diff(split.offsets)
    unused = sizes[windows == 0].sum() / sizes.sum()
    if unused > 0.5:
        told = "config.training.length = %d: %.0f %% of the %s tokens are not used; their documents are not longer"
        log.warning(f"{told}; config.data.packing = 'documents' uses them", length, 100 * unused, split.name)
    return int(windows.sum()) * length


class _Batches:
    """A source of batches by step: row r of step s is draw `s * batch_size + r` in the order of all epochs."""

    def __init__(self, split: Split, length: int, batch_size: int, rows: np.ndarray, seed: int):
        per_document = _windows_per_document(split, length, "config.training.length")
        self._documents = np.repeat(np.arange(len(per_document)), per_document)
        number = np.arange(len(self._documents)) - (np.cumsum(per_document) - per_document)[self._documents]
        self._starts = split.offsets[self._documents] + number * length
        self._last_starts = split.offsets[self._documents + 1] - (length + 1)
        spare = np.diff(split.offsets) - 1 - per_document * length
        self._offset_limits = 1 + np.where(per_document > 1, length - 1, np.maximum(spare, 0))
        self._windows = sliding_window_view(np.asarray(split.tokens), length + 1)
        self._batch_size, self._rows, self._seed = batch_size, rows, seed
        self._epoch_starts = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> np.ndarray:
        epochs, places = np.divmod(index * self._batch_size + self._rows, len(self._starts))
        starts = [self._epoch_starts(epoch)[places[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
        return self._windows[np.concatenate(starts)].astype(np.int32)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """The start offsets of an epoch's windows, in the order in which they are drawn. No window crosses an end."""
        random = np.random.default_rng((self._seed, epoch))
        offsets = random.integers(self._offset_limits)
        return random.permutation(np.minimum(self._starts + offsets[self._documents], self._last_starts))


@dataclass(frozen=True)
class EvaluationWindows:
    """The windows that every model is scored on."""

    tokens: np.ndarray  # int32 [n, length + 1]
    documents: tuple[str, ...]  # [n], the name of each window's document


def evaluation_windows(
    split: Split, *, length: int, count: int, field: str = "config.evaluation.lengths", remedy: str = ""
) -> EvaluationWindows:
    """At most `count` windows without overlap, spread evenly over the documents that are long enough, and inside each.

    The windows depend only on the split, length and count. Raises ConfigError for `field`, the setting of the length,
    if no document is long enough. Its message ends with `remedy`.
    """
    shares = _even_shares(_windows_per_document(split, length, field, remedy), count)
    documents = np.repeat(np.arange(len(shares)), shares)
    number = np.arange(len(documents)) - (np.cumsum(shares) - shares)[documents]
    # Each document is divided into as many equal parts as it has windows; a window lies in the middle of its part.
    sizes, parts = (np.diff(split.offsets) - 1)[documents], shares[documents]
    starts = split.offsets[documents] + ((2 * number + 1) * sizes - parts * length) // (2 * parts)
    tokens = sliding_window_view(np.asarray(split.tokens), length + 1)[starts].astype(np.int32)
    return EvaluationWindows(tokens, tuple(split.names[document] for document in documents))


def _even_shares(available: np.ndarray, count: int) -> np.ndarray:
    """The number of windows from each document, [D]. Documents get one each in turn, up to `count` in total."""
    shares = np.zeros_like(available)
    while (missing := count - shares.sum()) and (able := np.flatnonzero(shares < available)).size:
        if missing < able.size:
            able = able[np.arange(missing) * able.size // missing]
        shares[able] += 1
    return shares


def _windows_per_document(split: Split, length: int, field: str, remedy: str = "") -> np.ndarray:
    """How many windows of length + 1 tokens, overlapping by one, fit into each document, [D]."""
    sizes = np.diff(split.offsets)
    windows = np.maximum(sizes - 1, 0) // length
    if not windows.any():
        longest = int(sizes.argmax())
        problem = f"must be below {sizes[longest]}, the tokens of {split.names[longest]!r}"
        raise ConfigError(field, length, f"{problem}, the longest document of the {split.name} split{remedy}")
    return windows
