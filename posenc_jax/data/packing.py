"""Training windows that hold several documents."""

import functools

import numpy as np

from posenc_jax.data.tokens import Split
from posenc_jax.schema import ConfigError


class PackedBatches:
    """A source of batches by step, int32 [rows, 2, length + 1]: tokens, and the number of each one's document.

    The documents of the split follow one another in an order that is drawn anew for each epoch, and so do the epochs.
    Windows are cut from this text every `length` tokens, so that an epoch reads each token once. Those that start in
    one epoch are drawn in random order. A window may begin or end inside a document. Its documents are numbered from 0.
    Row r of step s is draw `s * batch_size + r`. Raises ConfigError if the split has no more than `length` tokens.
    """

    def __init__(self, split: Split, length: int, batch_size: int, rows: np.ndarray, seed: int):
        sizes = np.diff(split.offsets)
        self._total = packed_tokens(split, length)
        self._tokens, self._length = np.asarray(split.tokens), length
        self._starts, self._sizes = split.offsets[:-1][sizes > 0], sizes[sizes > 0]
        self._batch_size, self._rows, self._seed = batch_size, rows, seed
        self._draws = functools.lru_cache(maxsize=4)(self._draw_epoch)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> np.ndarray:
        draws = index * self._batch_size + self._rows
        epochs = draws * self._length // self._total
        starts = [
            self._draws(epoch)[2][draws[epochs == epoch] - self._first(epoch)]
            for epoch in range(epochs[0], epochs[-1] + 1)
        ]
        places = np.concatenate(starts)[:, None] + np.arange(self._length + 1)  # in the text of all epochs
        tokens, documents, epochs = np.empty_like(places), np.empty_like(places), places // self._total
        for epoch in range(epochs.min(), epochs.max() + 1):
            order, ends, _ = self._draws(epoch)
            own = epochs == epoch
            within = places[own] - epoch * self._total
            rank = np.searchsorted(ends, within, side="right")
            document = order[rank]
            tokens[own] = self._tokens[self._starts[document] + within - ends[rank] + self._sizes[document]]
            documents[own] = epoch * len(order) + rank
        return np.stack([tokens, documents - documents[:, :1]], axis=1).astype(np.int32)

    def _first(self, epoch: int) -> int:
        """The number of windows that start before an epoch."""
        return -(-epoch * self._total // self._length)

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents of an epoch in their order, their ends, and the starts of its windows in the order of draws."""
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._sizes))
        windows = random.permutation(np.arange(self._first(epoch), self._first(epoch + 1)))
        return order, np.cumsum(self._sizes[order]), windows * self._length


def packed_tokens(split: Split, length: int) -> int:
    """The number of tokens in an epoch. Raises ConfigError if they do not fill a window of `length` + 1 tokens."""
    total = int(split.offsets[-1])
    if total <= length:
        allowed = f"must be below {total}, the tokens of the {split.name} split"
        raise ConfigError("config.training.length", length, allowed)
    return total
