r"""Copying over a distance: whether a model uses a text that it read n tokens before. Real text is shown twice.

A window has c tokens of text, then a chunk of c tokens, goes on with the text after it until n tokens from the chunk's
beginning, and shows the chunk again. The drop at distance n is the loss of the second showing after another chunk was
shown first, minus that after its own: same tokens, same positions, same text around. Zero: the model finds nothing at
that distance. The first token of the second showing is not counted, as nothing says yet that the chunk returns. The
text before the chunk keeps it off the first tokens of the window, which models attend to whatever stands there.

The other chunk is that of the next window of another document. Text of the same document would help the model too, and
how many windows have a neighbour of their own document depends on how many windows there are. Where all windows are of
one document, it is the next window's. A single window has no other chunk, so nothing is measured.

A low loss past the training length does not show that a model still reads what is far: a model may do as well by what
is near. Source: the repeated sequences of Olsson et al. 2022 ("In-context learning and induction heads"), there of
random tokens and against the first showing, which has less context before it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from posenc_jax.config import RunConfig
from posenc_jax.encodings import frequencies
from posenc_jax.evaluation import extrapolation
from posenc_jax.evaluation.measured import Key, Measured, Sums
from posenc_jax.evaluation.scoring import Scorer


def measure(
    config: RunConfig,
    scorer: Scorer,
    params: Any,
    constants: Any,
    windows: Int[np.ndarray, "W N"],
    token_bytes: Int[np.ndarray, "V"],
    documents: Sequence[str],
) -> Measured:
    """The drop at every distance of `config.evaluation`, under every scaling rule. None if it cannot read that far.

    `documents` names the document of each window. With one window nothing is measured. A rule that depends on the
    length is that of the whole window, n + 2 c - 1 tokens. Keys' lengths are the distances.
    """
    chunk, measured = config.evaluation.copy_chunk, {}
    if len(windows) == 1:
        return measured
    others = windows[of_another_document(documents), chunk : 2 * chunk]
    for distance in config.evaluation.copy_distances:
        length = window_length(config, distance)
        readable = extrapolation.can_read(config, scorer, params, constants, length)
        repeated, other = (shown_twice(windows, chunk, distance, first) for first in (None, others))
        both = np.concatenate([other, repeated])
        for scaling in config.evaluation.rope_scalings:
            key = Key(scaling, "copy_gain", distance)
            measured[key] = None
            if readable:
                rule = str(frequencies.parse(scaling).at(length, config.pretrained_reach))
                own = extrapolation.scaled_constants(config, constants, rule)
                losses = extrapolation.score(config, scorer, params, own, both, token_bytes)
                nats, num_bytes, tokens = losses.between(chunk + distance, length)
                without, with_first = np.split(nats, 2)
                half = slice(len(windows))
                measured[key] = Sums(without - with_first, num_bytes[half], tokens[half])
    return measured


def window_length(config: RunConfig, distance: int) -> int:
    """The number of tokens that are scored if text is shown again after `distance` tokens."""
    return distance + 2 * config.evaluation.copy_chunk - 1


def shown_twice(
    windows: Int[np.ndarray, "W N"], chunk: int, distance: int, first: Int[np.ndarray, "W chunk"] | None = None
) -> Int[np.ndarray, "W length"]:
    """Each window's second chunk, shown again `distance` tokens later. `first` replaces its first showing."""
    lead, own = windows[:, :chunk], windows[:, chunk : 2 * chunk]
    first = own if first is None else first
    return np.concatenate([lead, first, windows[:, 2 * chunk : chunk + distance], own], axis=1)


def of_another_document(documents: Sequence[str]) -> Int[np.ndarray, "W"]:
    """For each window the next one, cyclically, of another document; if there is one document, the next one."""
    count = len(documents)
    if len(set(documents)) == 1:
        return np.roll(np.arange(count), -1)
    found = np.empty(count, int)
    following = next(i for i, name in enumerate(documents) if name != documents[-1])
    for i in reversed(range(count)):
        if i + 1 < count and documents[i + 1] != documents[i]:
            following = i + 1
        found[i] = following
    return found
