r"""Methods that let a trained RoPE model read further, by giving pairs of tokens positions that the model knows.

A query i sees the keys near it at their own distance. Keys that are further away get other positions, or are hidden.
The logit of a pair is a product of a query and a key that are rotated by one of a few pairs of maps (a, b):

.. math:: z_{ij} = q_i \cdot R_{b(j) - a(i)}\, k_j / \sqrt{d}

Nothing is trained. A method is written like a scaling rule, "self_extend:window=512,group=8", and its numbers are in
tokens. Those that are 0, or not given, follow from `length`, that of the first training, and in `self_extend` from
the length that is `read`. Maps are made of operators alone, so that they take arrays of NumPy and of JAX.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Map = Callable[[Any], Any]  # positions to positions, of any shape, in float32


class Maps(NamedTuple):
    """Maps for queries and for keys, and `chosen(i, j)`: the index of the pair of maps, or -1 for a key that is hidden.

    `chosen` takes positions of queries and of keys, which broadcast against each other.
    """

    queries: tuple[Map, ...]
    keys: tuple[Map, ...]
    chosen: Callable[[Any, Any], Any]


def self_extend(length: int, *, read=0.0, window=0.0, group=0.0) -> Maps:
    """Self-Extend: beyond a window w, positions are divided by a group size G and rounded down.

    The far maps are floor(i / G) + w - floor(w / G) and floor(j / G), so that distances go on from w. By default w is a
    quarter of the training length, and with the default G all distances are below that length. Source: Jin et al. 2024,
    section 3.
    """
    window = window or max(length // 4, 1)
    group = group or max((read - 1) // max(length - window, 1) + 1, 1)
    shift = window - window // group
    return Maps((_same, lambda i: i // group + shift), (_same, lambda j: j // group), lambda i, j: _far(i, j, window))


def rerope(length: int, *, window=0.0) -> Maps:
    """ReRoPE: no distance exceeds a window, by default half of the training length. Source: Su 2023 (bojone/rerope)."""
    window = window or max(length // 2, 1)
    return Maps((_same, lambda i: 0 * i + window), (_same, lambda j: 0 * j), lambda i, j: _far(i, j, window))


def lm_infinite(length: int, *, first=10.0, window=0.0) -> Maps:
    """LM-Infinite: a query sees a window, and the first tokens of the text as if they were at its beginning.

    The default window is the training length. Source: Han et al. 2024, section 4.
    """
    window = window or length
    return rerope(length, window=window)._replace(chosen=lambda i, j: _first_or_hidden(_far(i, j, window), j, first))


def streaming(length: int, *, first=4.0, window=0.0) -> Maps:
    """StreamingLLM: a query sees a window w and the first tokens, with positions inside a cache of these tokens.

    The first tokens keep their positions, and to them no query is further than first + w - 1. By default w is the
    training length less the number of first tokens. Source: Xiao et al. 2024, section 3.2.
    """
    window = window or max(length - first, 1)
    maps = lm_infinite(length, first=first, window=window)
    return maps._replace(queries=(_same, lambda i: i.clip(max=first + window - 1)), keys=(_same, _same))


def dual_chunk(length: int, *, chunk=0.0) -> Maps:
    """Dual chunk attention: keys have their position j mod s inside a chunk of s tokens, and queries one of three.

    A query is at i mod s for keys of its own chunk, at min(s + i mod s, L - 1) for those of the chunk before it, and at
    L - 1 for all earlier ones, with L the training length. By default s is three quarters of L. Source: An et al. 2024
    (ChunkLlama), section 3. Raises ValueError if s is longer than L.
    """
    chunk = chunk or max(3 * length // 4, 1)
    if chunk > length:
        raise ValueError(f"chunk must be at most the training length, {length}")
    queries = (
        (lambda i: i % chunk),
        (lambda i: (chunk + i % chunk).clip(max=length - 1)),
        (lambda i: 0 * i + length - 1),
    )
    return Maps(queries, (lambda j: j % chunk,) * 3, lambda i, j: (i // chunk - j // chunk).clip(max=2))


METHODS: dict[str, Callable[..., Maps]] = {
    method.__name__: method for method in (self_extend, rerope, lm_infinite, streaming, dual_chunk)
}
WHOLE = ("window", "group", "first", "chunk")  # numbers of tokens


def _same(position: Any) -> Any:
    return position


def _far(i: Any, j: Any, window: float) -> Any:
    """1 for keys beyond the window, else 0."""
    return 1 * (i - j >= window)


def _first_or_hidden(far: Any, j: Any, first: float) -> Any:
    """-1 in place of 1 for keys that are not among the first tokens."""
    return far * (1 - 2 * (j >= first))
