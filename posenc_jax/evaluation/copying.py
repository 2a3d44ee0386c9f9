r"""Copying over a distance: whether a model uses text that it read n tokens before. Real text is shown twice.

A window consists of c tokens of text, a chunk of c tokens, the text that follows the chunk, and the chunk again. The
second showing begins n tokens after the first. The copy gain at distance n is the loss of the second showing if the
first showing is replaced by another chunk, minus its loss if it is not. The scored tokens, their positions and the text
around the chunks are the same in both cases. Zero: the model finds nothing at that distance. The first token of the
second showing is not scored, because nothing yet tells the model that the chunk returns. The c tokens before the chunk
keep it away from the first tokens of the window, which models attend to regardless of content.

The other chunk comes from the next window of another document. A chunk of the same document would also help the model,
and the share of windows whose neighbour is of their own document depends on the number of windows. The other chunk
comes from the next window if all windows are of one document. Nothing is measured with a single window, as it has no
other chunk.

A low loss past the training length does not show that a model still uses distant text: nearby text may be enough.
Source: the repeated sequences of Olsson et al. 2022 ("In-context learning and induction heads"). They use random
tokens, and compare with the first showing, which has less context before it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from posenc_jax.config import RunConfig
from posenc_jax.evaluation import extrapolation
from posenc_jax.evaluation.scoring import ScoredModel
from posenc_jax.evaluation.window_sums import Key, Sums, WindowSums


def measure_copies(
    model: ScoredModel, windows: Int[np.ndarray, "W N"], token_bytes: Int[np.ndarray, "V"], documents: Sequence[str]
) -> WindowSums:
    """The copy gain at every distance of `config.evaluation`, under every scaling rule.

    It is None at distances whose windows are longer than the model can read. `documents` names the document of each
    window. Nothing is measured with a single window. Rules that depend on the length use the length of the whole
    window, n + 2 c - 1 tokens. The lengths in the keys are the distances.
    """
    config, chunk, measured = model.config, model.config.evaluation.copy_chunk, {}
    if len(windows) == 1:
        return measured
    others = windows[of_another_document(documents), chunk : 2 * chunk]
    for distance in config.evaluation.copy_distances:
        length = window_length(config, distance)
        readable = extrapolation.can_read(model, length)
        repeated, other = (shown_twice(windows, chunk, distance, first) for first in (None, others))
        both = np.concatenate([other, repeated])
        for scaling in config.evaluation.rope_scalings:
            key = Key(scaling, "copy_gain", distance)
            measured[key] = None
            if readable:
                rule = extrapolation.rule_at(config, scaling, length)
                losses = extrapolation.score_scaled(model, rule, both, token_bytes)
                nats, num_bytes, tokens = losses.between(chunk + distance, length)
                without, with_first = np.split(nats, 2)
                half = slice(len(windows))
                measured[key] = Sums(without - with_first, num_bytes[half], tokens[half])
    return measured


def window_length(config: RunConfig, distance: int) -> int:
    """The number of tokens that the model reads if text is shown again after `distance` tokens."""
    return distance + 2 * config.evaluation.copy_chunk - 1


def shown_twice(
    windows: Int[np.ndarray, "W N"], chunk: int, distance: int, first: Int[np.ndarray, "W chunk"] | None = None
) -> Int[np.ndarray, "W length"]:
    """The windows with their second chunk shown again `distance` tokens later. `first` replaces its first showing."""
    lead, own = windows[:, :chunk], windows[:, chunk : 2 * chunk]
    first = own if first is None else first
    return np.concatenate([lead, first, windows[:, 2 * chunk : chunk + distance], own], axis=1)


def of_another_document(documents: Sequence[str]) -> Int[np.ndarray, "W"]:
    """The index of the next window of another document, cyclically. The next window if all are of one document."""
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
