"""Sums of losses, bytes and tokens for each window. Tables, intervals and differences are computed from them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from posenc_jax.config import RunConfig
from posenc_jax.files import atomic_write, sha256_of
from posenc_jax.results import ANSWERS, RETRIEVAL
from posenc_jax.untrusted import DamagedError, check_form, damaged_if_invalid, parse_json, read_arrays

MAX_KEYS = 10_000


class Key(NamedTuple):
    """What was measured: the scaling rule, the loss, and the length or distance in tokens."""

    scaling: str
    # prefix | prefix_change | tail | context_gain | by_position | copy_gain | long | one of RETRIEVAL or of ANSWERS
    metric: str
    length: int  # of a task: the size


class Sums(NamedTuple):
    """For each window: the nats, the bytes and the number of the scored tokens."""

    nats: Float[np.ndarray, "W"]
    bytes: Float[np.ndarray, "W"]
    tokens: Float[np.ndarray, "W"]


class Recall(NamedTuple):
    """For each trial of a retrieval task, or sample of a task: the nats of its answer, and how many parts are right."""

    nats: Float[np.ndarray, "N"]
    right: Float[np.ndarray, "N"]
    items: Float[np.ndarray, "N"]


WindowSums = dict[Key, Any]  # Sums or, for RETRIEVAL and ANSWERS, Recall; None: the model cannot read that length


class FormatError(Exception):
    """A file of sums comes from a release that wrote no checksum."""

    exit_code = 4


def write_sums(
    path: Path, measured: Mapping[Key, Sums | Recall | None], documents: Sequence[str], record: Mapping[str, Any]
) -> None:
    """Write an .npz file completely or not at all: `record` as JSON, the document of each window, and a checksum.

    Sums are in float32.
    """
    arrays = {
        "/".join(map(str, key)): np.asarray([] if sums is None else sums, np.float32) for key, sums in measured.items()
    }
    arrays |= {"record": np.array(json.dumps(record)), "documents": np.array(documents, str)}
    with atomic_write(path) as file:
        np.savez_compressed(file, sha256=np.array(_sum(arrays)), **arrays)  # type: ignore[arg-type]


def read_sums(path: Path, config: RunConfig | None = None) -> tuple[WindowSums, tuple[str, ...], dict[str, Any]]:
    """The sums, the document of each window and the record that `write_sums` wrote.

    They must fit a run of `config` if it is given. Raises DamagedError, FormatError, and OSError.
    """
    arrays, measured = read_arrays(path), {}
    if "sha256" not in arrays:
        raise FormatError(f"{path} has no checksum: it is of another release of posenc_jax")
    if str(arrays.pop("sha256")) != _sum(arrays):
        raise DamagedError(f"{path} is damaged: it does not have the sum that it was written with")
    with damaged_if_invalid(path):
        record, documents = parse_json(str(arrays.pop("record"))), tuple(arrays.pop("documents").tolist())
        check_form([record, *documents], [dict | str])
        for name, values in arrays.items():
            scaling, metric, length = name.rsplit("/", 2)
            kind = Recall if metric in RETRIEVAL or metric in ANSWERS else Sums
            count = len(documents) if kind is Sums else values.size // 3
            if values.dtype != np.float32 or (values.size and values.shape != (3, count)):
                raise ValueError(f"{name} does not have the sums of {count} windows or trials")
            measured[Key(scaling, metric, int(length))] = kind(*values.astype(np.float64)) if values.size else None
        if config is not None:
            _check_fits(measured, documents, config)
    return measured, documents, record


def _check_fits(measured: WindowSums, documents: Sequence[str], config: RunConfig) -> None:
    """Raise ValueError if a scaling rule, a length or the number of windows is not possible with this config."""
    evaluation = config.evaluation
    lengths = {*evaluation.lengths, *evaluation.copy_distances}
    for key, sums in measured.items():
        at_known = key.length in lengths or (key.metric == "by_position" and 0 < key.length <= evaluation.lengths[-1])
        if key.metric in RETRIEVAL:
            trials = evaluation.retrieval_trials if sums is None else len(sums.items)
            at_known = key.length in evaluation.task_lengths and trials == evaluation.retrieval_trials
        if key.metric in ANSWERS:
            count = evaluation.windows if sums is None else len(sums.items)
            at_known = key.length in config.task.test_sizes and count == evaluation.windows
        if key.scaling not in evaluation.rope_scalings or not at_known:
            raise ValueError(f"{'/'.join(map(str, key))} is not of a run with these settings")
    if len(documents) > evaluation.windows or len(measured) > MAX_KEYS:
        raise ValueError(f"it has {len(measured)} kinds of sums of {len(documents)} windows")


def _sum(arrays: Mapping[str, np.ndarray]) -> str:
    """A checksum of names, types, shapes and bytes."""
    sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    return sha256_of([[name, array.dtype.str, array.shape, sums[name]] for name, array in arrays.items()])
