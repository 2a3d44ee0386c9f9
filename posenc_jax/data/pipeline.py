"""From token files to batches: a batch is a function of seed and step."""

from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int

from posenc_jax.data.tokens import Split
from posenc_jax.schema import ConfigError


@dataclass(frozen=True)
class EvaluationWindows:
    """Windows of tokens and the documents they come from."""

    tokens: Int[np.ndarray, "W N"]
    documents: tuple[str, ...]


def training_batches(
    split: Split, *, length: int, batch_size: int, seed: int, start_step: int = 0, shard: tuple[int, int] = (0, 1)
) -> Iterator[Int[np.ndarray, "B N"]]:
    """Endless int32 batches of windows of `length` + 1 tokens, from the batch of step `start_step` on.

    Each epoch takes all windows of a tiling of the documents, shuffled anew, every one shifted at random by less than a
    length; none crosses a document. `shard` = (i, n) gives the i-th of n equal parts of each batch. Raises ConfigError if
    no document is long enough.
    """
    windows = _Windows(split, length)
    index, count = shard
    batches = (
        grain.MapDataset.source(windows)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(windows.tokens)
        .batch(batch_size)
        .slice(slice(start_step, None))
        .map(lambda batch: batch[index * batch_size // count : (index + 1) * batch_size // count])
    )
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def epoch_tokens(split: Split, length: int) -> int:
    """Tokens that one epoch of windows of `length` trains on."""
    return len(_Windows(split, length)) * length


class _Windows:
    """The tiling of a split's documents by windows of `length` + 1 tokens that share their ends."""

    def __init__(self, split: Split, length: int):
        counts = np.maximum(np.diff(split.offsets) - 1, 0) // length
        if not counts.any():
            longest = int(np.diff(split.offsets).max())
            allowed = f"must be below the tokens of the longest document to train on, {longest}"
            raise ConfigError("config.training.length", length, allowed)
        self._split, self._length = split, length
        document = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._starts = split.offsets[document] + within * length
        self._last_starts = split.offsets[document + 1] - length - 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> int:
        return i

    def tokens(self, i: int, rng: np.random.Generator) -> Int[np.ndarray, "N"]:
        """Window i, moved at random but not past the end of its document."""
        start = min(self._starts[i] + rng.integers(self._length), self._last_starts[i])
        return self._split.tokens[start : start + self._length + 1].astype(np.int32)


def evaluation_windows(split: Split, *, length: int, count: int) -> EvaluationWindows:
    """Up to `count` windows of `length` + 1 tokens that share no token, spread evenly over the documents.

    The same for every model and seed. Raises ConfigError if no document is long enough.
    """
    sizes = np.diff(split.offsets)
    room = sizes // (length + 1)
    if not room.any():
        allowed = f"are longer than any held-out document, of which the longest has {int(sizes.max())} tokens"
        raise ConfigError("config.evaluation.lengths", length, allowed)
    # Round after round, each document that has room gives one window more.
    share = np.zeros_like(room)
    while share.sum() < min(count, room.sum()):
        open_documents = np.flatnonzero(share < room)
        missing = count - share.sum()
        if missing < len(open_documents):
            open_documents = open_documents[np.linspace(0, len(open_documents) - 1, missing).round().astype(int)]
        share[open_documents] += 1
    windows, names = [], []
    for document in np.flatnonzero(share):
        # Evenly over the document: as much text is left out before, between and after its windows.
        free = sizes[document] - share[document] * (length + 1)
        for i in range(share[document]):
            start = split.offsets[document] + i * (length + 1) + free * (i + 1) // (share[document] + 1)
            windows.append(split.tokens[start : start + length + 1].astype(np.int32))
            names.append(split.names[document])
    return EvaluationWindows(np.stack(windows), tuple(names))
