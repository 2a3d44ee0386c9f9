"""The content of the walkthrough, in order: titles, text, tables of numbers and pictures, in either language.

`page` and `terminal` render it. Every number in it comes from the trace.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from posenc_jax.walkthrough.english import ENGLISH
from posenc_jax.walkthrough.korean import KOREAN
from posenc_jax.walkthrough.reading import MOVED, Trained
from posenc_jax.walkthrough.trace import BASE, BIAS_SPAN, SHIFT, Trace

FORMULAS = {  # the same in every language
    "tokens.id": "id",
    "positional.sinusoidal.shapes": "θᵢ = 10,000^(-2i/{D})\nPE(m, 2i) = sin(m θᵢ)\nPE(m, 2i+1) = cos(m θᵢ)\nPE: {TD}",
    "sum.shapes": "{TD} + {TD} = {TD}",
    "project.shapes": "q = x W_q: {TD} @ {DD} = {TD} -> {THd}\nk = x W_k: {TD} @ {DD} = {TD} -> {THd}",
    "rotate.shapes": "θᵢ = 10,000^(-2i/{d})\n(a, b) -> (a cos mθᵢ - b sin mθᵢ, a sin mθᵢ + b cos mθᵢ)",
    "rotate.theta": "θᵢ",
    "rotate.between": "k - q",
    "product.shapes": "(R_m q) · (R_n k) = q · (R_(n-m) k)",
    "product.plain": "q · k",
    "attend.shapes": "a_n = softmax over n of q · k_n / √{d}\no = sum over n of a_n v_n\n"
    "all heads: weights ({H}, {T}, {T}) @ v {THd} -> {THd}\nside by side: {TD} @ W_o {DD} = {TD}",
    "product.rope": "RoPE {q}, {k}",
    "label.product": "q · k",
    "label.rope": "RoPE",
    "box.project": "q = x W_q, k = x W_k, v = x W_v {THd}",
    "box.attend": "softmax(q · k / √{d}) · v",
}
LANGUAGES = {"en": ENGLISH | FORMULAS, "ko": KOREAN | FORMULAS}
MAX_ROWS = 12  # of a table; a longer table leaves out rows before its last row
COLUMNS = 6  # number of matrix columns that a table shows


class Text(NamedTuple):
    text: str


class Shapes(NamedTuple):
    """An equation of shapes, or the formula behind it."""

    text: str


class Table(NamedTuple):
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Slip(NamedTuple):
    """A common misconception, and the truth."""

    told: str
    truth: str


class Picture(NamedTuple):
    file: str
    caption: str
    narrow: str | None = None  # the file for a narrow screen, if it has one of its own


Part = Text | Shapes | Table | Slip | Picture


class Section(NamedTuple):
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Words:
    """The texts of one language, with the names in braces filled in from one trace: `words(key, ...)`."""

    trace: Trace
    language: str

    def __call__(self, key: str, **more: Any) -> str:
        return LANGUAGES[self.language][key].format(**{**self._facts, **more})

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """The values that the text can refer to: sizes, shapes, positions and numbers of the trace."""
        trace, settings, tokens = self.trace, self.trace.settings, self.trace.tokens
        pair, shifted = trace.pair, trace.shifted
        T, V, D, H, d = len(tokens.ids), tokens.vocab_size, settings.width, settings.heads, trace.head_dim
        sizes = {"T": T, "V": V, "D": D, "H": H, "d": d, "half": d // 2, "last": T - 1, "slowest": d // 2 - 1}
        shapes = {"TV": (T, V), "VD": (V, D), "TD": (T, D), "DD": (D, D), "THd": (T, H, d)}
        read = {"sentence": tokens.sentence, "first": tokens.pieces[0], "final": tokens.pieces[-1]}
        here = {"q1": pair.q_position, "k1": pair.k_position, "a": "" if pair.added is None else number(pair.added[0])}
        there = {"q2": shifted.q_position, "k2": shifted.k_position, "shift": SHIFT}
        turns = shifted.k_position * trace.theta
        turned, trained = trace.turned, trace.trained
        return {
            **({} if trained is None else self._of_model(trained)),
            **(sizes | shapes | read | here | there),
            "b": "" if shifted.added is None else number(shifted.added[0]),
            "seed": settings.seed,
            "length": settings.table_length,
            "end": settings.table_length - 1,
            "columns": min(D, 64),
            "span": BIAS_SPAN,
            "root": f"{math.sqrt(D):.4g}",
            "row": ", ".join(f"{x:g}" for x in trace.sinusoidal[0, :COLUMNS]),
            "norm": f"{np.linalg.norm(trace.sinusoidal[0]):.4g}",
            "longest": f"{2 * math.pi * BASE ** ((D - 2) / D):,.0f}",
            "fast": f"{turns[0]:.4g}",
            "slow": f"{turns[-1]:.2g}",
            "wrong": f"{44 % (2 * math.pi):.4f}",
            "dq": f"{np.abs(shifted.q - pair.q).max():.2f}",
            "dk": f"{np.abs(shifted.k - pair.k).max():.2f}",
            "worst": f"{np.abs(shifted.product - pair.product).max():.2g}",
            "same": f"{np.abs(turned[1].output - turned[0].output).max():.2g}",
        }

    def _of_model(self, trained: Trained) -> dict[str, Any]:
        layers, heads = trained.plain.weights.shape[:2]
        plain, moved = trained.weights(trained.plain), trained.moved
        return {
            "model": trained.model,
            "encoding": trained.encoding,
            "moved": MOVED,
            "layer": trained.layer + 1,
            "layers": layers,
            "head": trained.head + 1,
            "heads": heads,
            "previous": f"{trained.previous(trained.plain):.2f}",
            "lost": f"{trained.previous(trained.without):.2f}",
            "change": "" if moved is None else f"{np.abs(trained.weights(moved) - plain).max():.2g}",
        }


def number(x: float | np.floating) -> str:
    """A number in a table: signed, with four decimals."""
    return f"{x:+.4f}".replace("-", "\N{MINUS SIGN}")


def title(trace: Trace, language: str) -> str:
    return Words(trace, language)("title")


def sections(trace: Trace, language: str) -> tuple[Section, ...]:
    """All sections. The first one has no title."""
    say = Words(trace, language)
    added, before, after = trace.settings.positions, trace.pair.turned_early, trace.shifted.turned_early
    (angles, vectors), (weights, outputs) = _rotations(say), _attended(say)
    random = Text(say("intro") if trace.trained is None else f"{say('intro')} {say('intro.trained')}")
    diagram = Picture("pipeline.png", say("pipeline.caption"), "pipeline_narrow.png")
    return (
        Section("", (random, diagram)),
        _section(say, "tokens", trace.tokens.origin, _ids(say)),
        _section(say, "embedding", "text", "shapes", "scale", _matrix(say, trace.embedded)),
        _section(
            say,
            "positional",
            added,
            f"{added}.shapes",
            _matrix(say, trace.positional),
            _slip(say, "zero"),
            _picture(say, "sinusoidal"),
            _picture(say, "wavelengths"),
        ),
        _section(
            say,
            "sum",
            "text",
            "shapes",
            _matrix(say, trace.added),
            _picture(say, "sum"),
            _slip(say, "sum", "beyond" if trace.shifted.added is None else "truth"),
        ),
        _section(say, "project", "text", "shapes", _slip(say, "place", a=number(before[0]), b=number(after[0]))),
        _section(
            say,
            "rotate",
            "text",
            "shapes",
            "angles",
            angles,
            _slip(say, "theta"),
            "vectors",
            vectors,
            _picture(say, "rotation"),
            Picture("rotation.gif", say("animation.caption")),
        ),
        _section(say, "product", "text", "shapes", _products(say), _slip(say, "relative"), _picture(say, "products")),
        _section(say, "attend", "text", "shapes", weights, "output", outputs, "end"),
        _section(say, "decay", "text", _picture(say, "decay")),
        _section(say, "biases", "text", _picture(say, "biases")),
        *(() if trace.trained is None else (_trained(say, trace.trained),)),
    )


def _section(say: Words, name: str, *parts: str | Part) -> Section:
    """A section of these parts. A key, such as "text", stands for the text NAME.text."""

    def part_of(key: str) -> Part:
        return (Shapes if key.endswith("shapes") else Text)(say(f"{name}.{key}"))

    return Section(say(f"{name}.title"), tuple(part_of(x) if isinstance(x, str) else x for x in parts))


def _slip(say: Words, name: str, truth: str = "truth", **more: str) -> Slip:
    return Slip(say(f"slip.{name}"), say(f"slip.{name}.{truth}", **more))


def _picture(say: Words, name: str) -> Picture:
    return Picture(f"{name}.png", say(f"{name}.caption"))


def _ids(say: Words) -> Table:
    tokens = zip(say.trace.tokens.pieces, say.trace.tokens.ids, strict=True)
    rows = [(str(m), piece, str(own_id)) for m, (piece, own_id) in enumerate(tokens)]
    return _table((say("position"), say("token"), say("tokens.id")), rows)


def _matrix(say: Words, values: Float[np.ndarray, "T D"]) -> Table:
    """The first columns of a matrix with a row for each token."""
    header = (say("position"), say("token"), *map(str, range(COLUMNS)))
    rows = zip(say.trace.tokens.pieces, values[:, :COLUMNS], strict=True)
    return _table(header, [(str(m), piece, *map(number, row)) for m, (piece, row) in enumerate(rows)])


def _rotations(say: Words) -> tuple[Table, Table]:
    """The angles of some pairs of channels, and the first channels of q and k in head 1 before and after rotation."""
    trace, theta, both = say.trace, say.trace.theta, (say.trace.pair, say.trace.shifted)
    rotated = [("q", at.q_position, at.q[0]) for at in both] + [("k", at.k_position, at.k[0]) for at in both]
    names = [say("rotate.angle", name=name, position=position) for name, position, _ in rotated]
    header = (say("rotate.pair"), say("rotate.theta"), say("rotate.wavelength"), *names, say("rotate.between"))
    distance = trace.pair.k_position - trace.pair.q_position
    angles = [
        (
            *(str(i), f"{theta[i]:.6f}", f"{2 * math.pi / theta[i]:,.2f}"),
            *(f"{tokens * theta[i]:.4f}" for tokens in (*(position for _, position, _ in rotated), distance)),
        )
        for i in sorted({*range(min(4, len(theta))), len(theta) // 2, len(theta) - 1})
    ]
    vectors = [(name, values) for name, (*_, values) in zip(names, rotated, strict=True)]
    vectors = [("q", trace.q[0, 0]), *vectors[:2], ("k", trace.k[-1, 0]), *vectors[2:]]
    channels = [(name, *map(number, values[:COLUMNS])) for name, values in vectors]
    return _table(header, angles), _table(("", *map(str, range(COLUMNS))), channels)


def _products(say: Words) -> Table:
    """q · k in each head: without rotation, and with RoPE and with positions added at both pairs of positions."""
    trace, both = say.trace, (say.trace.pair, say.trace.shifted)
    plain = np.einsum("hd,hd->h", trace.q[0], trace.k[-1])
    columns = (plain, *(at.product for at in both), *(at.added for at in both))
    rows = [(str(h + 1), *("" if x is None else number(x[h]) for x in columns)) for h in range(len(plain))]
    return _table((say("label.heads"), say("product.plain"), *_ways(say)), rows)


def _attended(say: Words) -> tuple[Table, Table]:
    """The weights of the last query in head 1 and the first channels of its output, in the cases of `_ways`."""
    cases = (*say.trace.turned, *say.trace.summed)
    columns = [() if at is None else at.weights for at in cases]
    rows = [
        (str(m), piece, number(logit), *(f"{column[m]:.4f}" if len(column) else "" for column in columns))
        for m, (piece, logit) in enumerate(zip(say.trace.tokens.pieces, say.trace.turned[0].logits, strict=True))
    ]
    header = say("position"), say("token"), say("attend.logit", d=say.trace.head_dim), *_ways(say)
    outputs = [
        (way, *map(number, at.output[:COLUMNS])) for way, at in zip(_ways(say), cases, strict=True) if at is not None
    ]
    return _table(header, rows), _table(("", *map(str, range(COLUMNS))), outputs)


def _trained(say: Words, trained: Trained) -> Section:
    """What one head of a trained model sees, and the tokens that it expects next."""
    readings = (trained.plain, trained.without, trained.moved)
    header = (say("token"), *(say(f"label.{name}") for name in ("trained", "without", "moved")))
    rows = [
        (piece, *("" if reading is None else f"{reading.following[i]:.4f}" for reading in readings))
        for piece, i in zip(trained.likely, trained.likely_ids, strict=True)
    ]
    moved = "beyond" if trained.moved is None else "moved"
    return _section(say, "trained", "text", _picture(say, "trained"), moved, "next", _table(header, rows))


def _ways(say: Words) -> list[str]:
    """The names of the four cases: with RoPE and with positions added, at both pairs of positions."""
    both = (say.trace.pair, say.trace.shifted)
    return [say(f"product.{way}", q=at.q_position, k=at.k_position) for way in ("rope", "added") for at in both]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    if len(rows) > MAX_ROWS:
        rows = [*rows[: MAX_ROWS - 2], ("…",) * len(header), rows[-1]]
    return Table(header, tuple(rows))
