"""What was measured of a model, window by window: the sums that tables, intervals and differences are made of."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from posenc_jax.files import replacing


class Key(NamedTuple):
    """What was measured: under which scaling rule, which loss, and at which length or distance in tokens."""

    scaling: str
    metric: str  # prefix | prefix_change | tail | context_gain | by_position | repeat
    length: int


class Sums(NamedTuple):
    """Of each window: nats, bytes and number of the tokens that count."""

    nats: Float[np.ndarray, "W"]
    bytes: Float[np.ndarray, "W"]
    tokens: Float[np.ndarray, "W"]


Measured = dict[Key, Sums | None]  # None: the model cannot read that length


def write_measured(
    path: Path, measured: Mapping[Key, Sums | None], documents: Sequence[str], record: Mapping[str, Any]
) -> None:
    """Write an .npz file whole or not at all: `record` as JSON, the document of each window, the sums in float32."""
    arrays: dict[str, Any] = {
        "/".join(map(str, key)): np.asarray([] if sums is None else sums, np.float32) for key, sums in measured.items()
    }
    with replacing(path) as file:
        np.savez_compressed(file, record=np.array(json.dumps(record)), documents=np.array(documents, str), **arrays)


def read_measured(path: Path) -> tuple[Measured, tuple[str, ...], dict[str, Any]]:
    """The sums, the document of each window and the record that `write_measured` left."""
    with np.load(path, allow_pickle=False) as file:
        record, documents = json.loads(str(file["record"])), tuple(file["documents"].tolist())
        measured: Measured = {}
        for name in file.files:
            if name not in ("record", "documents"):
                scaling, metric, length = name.rsplit("/", 2)
                sums = file[name].astype(np.float64)
                measured[Key(scaling, metric, int(length))] = Sums(*sums) if sums.size else None
    return measured, documents, record
