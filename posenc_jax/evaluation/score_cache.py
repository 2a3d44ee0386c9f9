"""Scores of finished batches, kept in a folder, so that a stopped evaluation continues where it was."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.files import atomic_write, sha256_of
from posenc_jax.untrusted import DamagedError, read_arrays


class ScoreCache(Scorer):
    """A scorer that reads the scores of a batch from a folder if they are there, and otherwise computes and keeps them.

    The name of a file is a checksum of everything that the losses depend on: the tokens, their positions, the hidden
    tokens, the constants, which contain the scaling rule, and the `identity`. A file that is damaged or of another
    shape is ignored and written again. For a single process only.

    Args:
      scorer: computes the losses. Its compiled programs are shared.
      folder: is created if it does not exist.
      identity: identifies the parameters, and whatever else changes the losses, such as the version of jax.
      after_batch: called after each batch. It may raise an exception to stop the evaluation.
      least_seconds: a batch that takes less time is not kept.
    """

    def __init__(
        self,
        scorer: Scorer,
        folder: Path,
        identity: str,
        *,
        after_batch: Callable[[], None] = lambda: None,
        least_seconds: float = 1.0,
    ):
        vars(self).update(vars(scorer))
        self._folder, self._identity = folder, identity
        self._after_batch, self._least_seconds = after_batch, least_seconds
        self._summed: tuple[Any, str] = None, ""  # the last constants and their checksum
        folder.mkdir(exist_ok=True)

    def of(self, graphdef: nnx.GraphDef, name: str) -> Scorer:
        options = {"after_batch": self._after_batch, "least_seconds": self._least_seconds}
        return ScoreCache(super().of(graphdef, name), self._folder, f"{self._identity} {name}", **options)

    def score_batch(
        self,
        mesh: Mesh,
        params: Any,
        constants: Any,
        tokens: Int[np.ndarray, "B N"],
        positions: np.ndarray | None,
        hidden: Bool[np.ndarray, "B N-1"] | None = None,
        *,
        last: int | None = None,
    ) -> list[np.ndarray]:
        name = sha256_of([self._identity, self._sum_of(constants), _sum((tokens, positions, hidden)), last])
        path, begun = self._folder / f"{name}.npz", time.monotonic()
        types = [np.float32] if last is None else [np.float32, np.int32]
        found = _read(path, (len(tokens), tokens.shape[1] - 1 if last is None else last), types)
        if found is None:
            found = super().score_batch(mesh, params, constants, tokens, positions, hidden, last=last)
            if time.monotonic() - begun >= self._least_seconds:
                with atomic_write(path) as file:
                    np.savez(file, *found)
        self._after_batch()
        return found

    def _sum_of(self, constants: Any) -> str:
        if self._summed[0] is not constants:
            self._summed = constants, _sum(map(np.asarray, jax.tree.leaves(constants)))
        return self._summed[1]


def _read(path: Path, shape: tuple[int, int], types: Sequence[Any]) -> list[np.ndarray] | None:
    """Arrays of these types, all of one shape; None if the file has others, or does not exist."""
    try:
        arrays = read_arrays(path)
    except (FileNotFoundError, DamagedError):
        return None
    kept = [arrays[name] for name in sorted(arrays)]
    return kept if [(x.dtype, x.shape) for x in kept] == [(own, shape) for own in types] else None


def _sum(arrays: Iterable[np.ndarray | None]) -> str:
    """A checksum of types, shapes and bytes."""
    return sha256_of([x if x is None else [str(x.dtype), x.shape, _sha256(x)] for x in arrays])


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
