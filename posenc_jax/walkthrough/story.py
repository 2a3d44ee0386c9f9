"""The content of the walkthrough, in order: titles, text, tables of numbers and pictures, in either language.

`page` and `terminal` render it. Every number in it comes from the trace.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from posenc_jax.walkthrough.english import ENGLISH
from posenc_jax.walkthrough.korean import KOREAN
from posenc_jax.walkthrough.trace import BASE, BIAS_SPAN, SHIFT, Trace

LANGUAGES = {"en": ENGLISH, "ko": KOREAN}
MOST_ROWS = 12  # of a table; a longer table leaves out rows before its last row
COLUMNS = 6  # number of matrix columns that a table shows


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Shapes:
    """An equation of shapes, or the formula behind it."""

    text: str


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Slip:
    """A common misconception, and the truth."""

    told: str
    truth: str


@dataclass(frozen=True)
class Picture:
    file: str
    caption: str


@dataclass(frozen=True)
class Section:
    title: str
    parts: tuple[Text | Shapes | Table | Slip | Picture, ...]


def title(trace: Trace, language: str) -> str:
    return LANGUAGES[language]["title"].format(sentence=trace.tokens.sentence)


def sections(trace: Trace, language: str) -> tuple[Section, ...]:
    """All sections. The first one has no title."""
    words, known = LANGUAGES[language], facts(trace)

    def say(key: str, **more: Any) -> str:
        return words[key].format(**{**known, **more})

    return (
        Section("", (Text(say("intro")), _picture(say, "pipeline"))),
        Section(
            say("tokens.title"),
            (
                Text(say(f"tokens.{trace.tokens.origin}")),
                _table(
                    (say("position"), say("token"), say("tokens.id")),
                    [
                        (str(m), piece, str(number))
                        for m, (piece, number) in enumerate(zip(trace.tokens.pieces, trace.tokens.ids, strict=True))
                    ],
                ),
            ),
        ),
        Section(
            say("embedding.title"),
            (
                Text(say("embedding.text")),
                Shapes(say("embedding.shapes")),
                Text(say("embedding.scale")),
                _matrix(trace, say, trace.embedded),
            ),
        ),
        _positional(trace, say),
        Section(
            say("sum.title"),
            (
                Text(say("sum.text")),
                Shapes(say("sum.shapes")),
                _matrix(trace, say, trace.added),
                _picture(say, "sum"),
                _slip(say, "sum", "slip.sum.truth" if trace.shifted.added is not None else "slip.sum.beyond"),
            ),
        ),
        Section(
            say("project.title"),
            (Text(say("project.text")), Shapes(say("project.shapes")), _slip(say, "place", **_if_turned_early(trace))),
        ),
        _rotation(trace, say),
        _product(trace, say),
        Section(say("decay.title"), (Text(say("decay.text")), _picture(say, "decay"))),
        Section(say("biases.title"), (Text(say("biases.text")), _picture(say, "biases"))),
    )


def facts(trace: Trace) -> dict[str, Any]:
    """The values that the text can refer to: sizes, shapes, positions and numbers of this trace."""
    T, D, H, d = len(trace.tokens.ids), trace.settings.width, trace.settings.heads, trace.head_dim
    V, pair, shifted = trace.tokens.vocab_size, trace.pair, trace.shifted
    turns = shifted.k_position * trace.theta
    return {
        "sentence": trace.tokens.sentence,
        "seed": trace.settings.seed,
        "T": T,
        "V": V,
        "D": D,
        "H": H,
        "d": d,
        "half": d // 2,
        "last": T - 1,
        "shift": SHIFT,
        "TV": f"({T}, {V})",
        "VD": f"({V}, {D})",
        "TD": f"({T}, {D})",
        "DD": f"({D}, {D})",
        "THd": f"({T}, {H}, {d})",
        "root": f"{math.sqrt(D):.4g}",
        "length": trace.settings.table_length,
        "end": trace.settings.table_length - 1,
        "row": ", ".join(f"{x:g}" for x in trace.sinusoidal[0, :COLUMNS]),
        "norm": f"{np.linalg.norm(trace.sinusoidal[0]):.4g}",
        "longest": f"{2 * math.pi * BASE ** ((D - 2) / D):,.0f}",
        "columns": min(D, 64),
        "span": BIAS_SPAN,
        "first": trace.tokens.pieces[0],
        "final": trace.tokens.pieces[-1],
        "q1": pair.q_position,
        "k1": pair.k_position,
        "q2": shifted.q_position,
        "k2": shifted.k_position,
        "a": "" if pair.added is None else number(pair.added[0]),
        "b": "" if shifted.added is None else number(shifted.added[0]),
        "fast": f"{turns[0]:.4g}",
        "slowest": d // 2 - 1,
        "slow": f"{turns[-1]:.2g}",
        "wrong": f"{44 % (2 * math.pi):.4f}",
        "dq": f"{np.abs(shifted.q - pair.q).max():.2f}",
        "dk": f"{np.abs(shifted.k - pair.k).max():.2f}",
        "worst": f"{np.abs(shifted.product - pair.product).max():.2g}",
    }


def number(x: float | np.floating) -> str:
    """A number in a table: signed, with four decimals."""
    return f"{x:+.4f}".replace("-", "\N{MINUS SIGN}")


def _positional(trace: Trace, say: Any) -> Section:
    key = f"positional.{trace.settings.positions}"
    parts = (
        Text(say(key)),
        Shapes(say(f"{key}.shapes")),
        _matrix(trace, say, trace.positional),
        _slip(say, "zero"),
        _picture(say, "sinusoidal"),
        _picture(say, "wavelengths"),
    )
    return Section(say("positional.title"), parts)


def _rotation(trace: Trace, say: Any) -> Section:
    pair, shifted, theta = trace.pair, trace.shifted, trace.theta
    planes = sorted({*range(min(4, len(theta))), len(theta) // 2, len(theta) - 1})
    angles = _table(
        (
            say("rotate.pair"),
            say("rotate.theta"),
            say("rotate.wavelength"),
            *(say("rotate.angle", name="q", position=at.q_position) for at in (pair, shifted)),
            *(say("rotate.angle", name="k", position=at.k_position) for at in (pair, shifted)),
            say("rotate.between"),
        ),
        [
            (
                str(i),
                f"{theta[i]:.6f}",
                f"{2 * math.pi / theta[i]:,.2f}",
                *(f"{at.q_position * theta[i]:.4f}" for at in (pair, shifted)),
                *(f"{at.k_position * theta[i]:.4f}" for at in (pair, shifted)),
                f"{(pair.k_position - pair.q_position) * theta[i]:.4f}",
            )
            for i in planes
        ],
    )
    vectors = [
        (say("rotate.before", name="q"), trace.q[0, 0]),
        *((say("rotate.angle", name="q", position=at.q_position), at.q[0]) for at in (pair, shifted)),
        (say("rotate.before", name="k"), trace.k[-1, 0]),
        *((say("rotate.angle", name="k", position=at.k_position), at.k[0]) for at in (pair, shifted)),
    ]
    channels = _table(
        ("", *map(str, range(COLUMNS))), [(name, *map(number, values[:COLUMNS])) for name, values in vectors]
    )
    parts = (
        Text(say("rotate.text")),
        Shapes(say("rotate.shapes")),
        Text(say("rotate.angles")),
        angles,
        _slip(say, "theta"),
        Text(say("rotate.vectors")),
        channels,
        _picture(say, "rotation"),
        Picture("rotation.gif", say("animation.caption")),
    )
    return Section(say("rotate.title"), parts)


def _product(trace: Trace, say: Any) -> Section:
    pair, shifted = trace.pair, trace.shifted
    plain = np.einsum("hd,hd->h", trace.q[0], trace.k[-1])
    header = (
        say("label.heads"),
        say("product.plain"),
        *(say("product.rope", q=at.q_position, k=at.k_position) for at in (pair, shifted)),
        *(say("product.added", q=at.q_position, k=at.k_position) for at in (pair, shifted)),
    )
    rows = [
        (
            str(h + 1),
            number(plain[h]),
            *(number(at.product[h]) for at in (pair, shifted)),
            *("" if at.added is None else number(at.added[h]) for at in (pair, shifted)),
        )
        for h in range(len(plain))
    ]
    parts = (
        Text(say("product.text")),
        Shapes(say("product.shapes")),
        _table(header, rows),
        _slip(say, "relative"),
        _picture(say, "products"),
    )
    return Section(say("product.title"), parts)


def _if_turned_early(trace: Trace) -> dict[str, str]:
    return {"a": number(trace.pair.turned_early[0]), "b": number(trace.shifted.turned_early[0])}


def _slip(say: Any, name: str, truth: str | None = None, **more: str) -> Slip:
    return Slip(say(f"slip.{name}"), say(truth or f"slip.{name}.truth", **more))


def _picture(say: Any, name: str) -> Picture:
    return Picture(f"{name}.png", say(f"{name}.caption"))


def _matrix(trace: Trace, say: Any, values: Float[np.ndarray, "T D"]) -> Table:
    """The first columns of a matrix with a row for each token."""
    header = (say("position"), say("token"), *map(str, range(COLUMNS)))
    rows = zip(trace.tokens.pieces, values[:, :COLUMNS], strict=True)
    return _table(header, [(str(m), piece, *map(number, row)) for m, (piece, row) in enumerate(rows)])


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    rows = tuple(rows)
    if len(rows) > MOST_ROWS:
        rows = (*rows[: MOST_ROWS - 2], ("…",) * len(header), rows[-1])
    return Table(header, rows)
