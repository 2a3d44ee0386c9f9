"""Lists the available encodings, or describes one of them.

python -m posenc_jax.encodings                     the table of all encodings
python -m posenc_jax.encodings alibi               one encoding: its docstring, settings and attention map
python -m posenc_jax.encodings alibi max_exponent=4
"""

import argparse
import functools
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import rich.console
from flax import nnx
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage
from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db

from posenc_jax import encodings
from posenc_jax.attention.dense import attention_weights
from posenc_jax.attention.dispatch import algorithm
from posenc_jax.encodings.base import AttentionInputs, Dims, Encoding, overrides
from posenc_jax.reporting.tables import Table, text_table
from posenc_jax.schema import ConfigError, literal

DIMS = Dims(d_model=128, num_heads=2, num_kv_heads=2, head_dim=64, max_length=256)  # of the default model
WIDTH = 80  # characters of a line in a file or a pipe
HOOKS = {"embed": "embeddings", "rotate": "queries and keys", "scores": "logits", "bias": "logits"}
HOOKS |= {"weights": "weights", "values": "values"}


@dataclass(frozen=True)
class EncodingInfo:
    """Properties of an encoding, derived from its code."""

    name: str
    acts_on: str  # embeddings, queries and keys, logits, weights, values
    learns: str  # number of parameters in the default model, and whether layers share them
    data_dependent: bool  # the effect depends on the content of the tokens
    relative: bool
    algorithm: str  # attention algorithm for long sequences
    source: str  # first authors and year

    @classmethod
    @functools.cache
    def of(cls, name: str) -> "EncodingInfo":
        encoding = encodings.build(name, DIMS, nnx.Rngs(0))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(encoding, nnx.Param)))
        source = re.search(r"Source:\s+(.*?\d{4}\)?)", inspect.getdoc(type(encoding)) or "", re.DOTALL)
        places = dict.fromkeys(place for hook, place in HOOKS.items() if overrides(encoding, hook))
        return cls(
            name,
            acts_on=" and ".join(places) or "nothing",
            learns=f"{parameters:,} {'shared' if encoding.shared else 'per layer'}" if parameters else "",
            data_dependent=_is_data_dependent(encoding),
            relative=encoding.relative,
            algorithm=algorithm(encoding, sys.maxsize).__name__,
            source=" ".join(source[1].split()) if source else "",
        )


def main(arguments: list[str]) -> None:
    """Print the table or one encoding. Raises ConfigError for an unknown name or setting."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m posenc_jax.encodings", description=__doc__, formatter_class=plain)
    parser.add_argument("name", nargs="?", help="an encoding from the table")
    parser.add_argument("settings", nargs="*", metavar="FIELD=VALUE", help="hyperparameters that override the defaults")
    parser.add_argument("--output", type=Path, help="path of the attention map; default: encoding_NAME.png")
    args = parser.parse_args(arguments)
    console = rich.console.Console(highlight=False)
    if args.name is None:
        table().print(console)
        return
    settings = dict(_setting(text) for text in args.settings)
    encoding = encodings.build(args.name, DIMS, nnx.Rngs(0), **settings)
    width = console.width if console.is_terminal else WIDTH
    console.print(readable(f"{args.name}: {inspect.getdoc(type(encoding))}", width), markup=False, soft_wrap=True)
    console.print("\nSettings:" if fields(type(encoding).Config) else "\nNo settings.")
    for field in fields(type(encoding).Config):
        changed = f"  (here {settings[field.name]!r})" if field.name in settings else ""
        console.print(f"  {field.name} = {field.default!r}{changed}", markup=False)
    weights = equal_token_weights(encoding)
    console.print(f"\nAttention of 256 identical tokens, head 1 of {DIMS.num_heads} (rows: queries, columns: keys):\n")
    console.print(_shades(weights[0]))
    output = args.output or Path(f"encoding_{args.name}.png")
    picture(weights, args.name).savefig(output, dpi=150)
    console.print(f"\npicture: {output}", markup=False)


def table() -> Table:
    """The table of all encodings and their properties."""
    rows = []
    for name in encodings.names():
        facts = EncodingInfo.of(name)
        yes_no = ("yes" if fact else "no" for fact in (facts.data_dependent, facts.relative))
        rows.append((name, facts.acts_on, facts.learns, *yes_no, facts.algorithm, facts.source))
    return text_table(("name", "acts on", "learns", "data dependent", "relative", "attention", "source"), rows)


def readable(docstring: str, width: int) -> str:
    """A docstring for a terminal: paragraphs in lines of at most `width` characters, and equations as plain text."""
    parts = []
    for part in re.split(r"\n\s*\n", docstring):
        before, math, tex = part.partition(".. math::")
        if math:
            parts.append("\n".join(f"    {line}" for line in equations(tex)))
        else:
            parts.append(textwrap.fill(" ".join(before.split()), width, break_long_words=False))
    return "\n\n".join(parts)


def equations(tex: str) -> Iterator[str]:
    r"""The equations of a formula in LaTeX, divided where `\quad` follows a comma, as plain text.

    Braces are kept around exponents and indices of more than letters and digits: base^{-2m/d}, but z_ij.
    """
    for equation in re.split(r"(?<=,) \\quad", " ".join(tex.split())):
        text = " ".join(_PLAIN.latex_to_text(equation).split())
        text = re.sub(r"([·←≤⊕⋯…])(?=\S)|(?<=\w)(?==\s)", r"\1 ", text)  # blanks after macros are lost
        text = re.sub(r"_\{(\w+)\}", r"_\1", text)
        yield re.sub(r"\((\w|√\(\w\))\)(?=/\()|(?<=/)\((\w|√\(\w\))\)", r"\1\2", text)


def _plain_text() -> LatexNodes2Text:
    context = get_default_latex_context_db()
    own = {"frac": "(%s)/(%s)", "operatorname": "%s", "hat": "%s\u0302", "ln": "ln "}
    macros = [MacroTextSpec(name, form) for name, form in own.items()]
    context.add_context_category("posenc_jax", prepend=True, macros=macros)
    return LatexNodes2Text(
        math_mode="text", latex_context=context, keep_braced_groups=True, keep_braced_groups_minlen=2
    )


_PLAIN = _plain_text()


def equal_token_weights(encoding: Encoding, length: int = DIMS.max_length) -> Float[np.ndarray, "H T T"]:
    """Attention weights between identical tokens. Differences along a row are caused by the encoding alone."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jnp.broadcast_to(jax.random.normal(keys[0], (DIMS.d_model,)), (1, length, DIMS.d_model))
    positions = jnp.arange(length)[None]
    if overrides(encoding, "embed"):  # the query and key projections are the identity
        q = k = encoding.embed(x, positions).reshape(1, length, DIMS.num_heads, DIMS.head_dim) / math.sqrt(2)
    else:
        shape = (DIMS.num_heads, DIMS.head_dim)
        q = k = jnp.broadcast_to(jax.random.normal(keys[1], shape) / math.sqrt(2), (1, length, *shape))
    ctx = encoding.prepare(x, positions)
    q, k = encoding.rotate(q, k, positions, positions, ctx)
    return np.asarray(attention_weights(encoding, AttentionInputs(q, k, k, positions, positions, ctx))[0])


def picture(weights: Float[np.ndarray, "H T T"], title: str) -> matplotlib.figure.Figure:
    """A heat map of the weights of each head, and the weights of the last query against distance."""
    heads, length, _ = weights.shape
    figure = matplotlib.figure.Figure(figsize=(3.2 * (heads + 1), 3.2), layout="constrained")
    *maps, curve = figure.subplots(1, heads + 1, squeeze=False)[0]
    for head, axes in enumerate(maps):
        image = _heat_map(axes, weights[head])
        axes.set(title=f"{title}, head {head + 1}", xlabel="key position", ylabel="query position")
    figure.colorbar(image, ax=maps[-1], label="attention weight")
    for head in range(heads):
        curve.plot(np.arange(length), weights[head, -1, ::-1], label=f"head {head + 1}")
    curve.set(title="last query", xlabel="distance (tokens)", ylabel="attention weight", yscale="log")
    curve.set_ylim(bottom=image.norm.vmin)
    curve.legend(frameon=False)
    return figure


def gallery(names: Sequence[str] = encodings.names(), length: int = 64, columns: int = 7) -> matplotlib.figure.Figure:
    """A heat map of the first head of each encoding, at its defaults, for `length` tokens."""
    rows = math.ceil(len(names) / columns)
    figure = matplotlib.figure.Figure(figsize=(1.5 * columns, 1.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        image = _heat_map(axes, equal_token_weights(encodings.build(name, DIMS, nnx.Rngs(0)), length)[0])
        axes.set(xticks=(), yticks=())
        axes.set_title(name, fontsize=10)
    for axes in panels[len(names) :]:
        axes.remove()
    figure.supxlabel("key position")
    figure.supylabel("query position")
    figure.colorbar(image, ax=panels[: len(names)].tolist(), label="attention weight", aspect=60)
    return figure


def _heat_map(axes: Axes, weights: Float[np.ndarray, "T T"]) -> AxesImage:
    """The weights of one head on a log scale. The smallest weight with a colour of its own is 1 % of 1/T."""
    length = len(weights)
    norm = LogNorm(vmin=1e-2 / length, vmax=1, clip=True)
    visible = np.where(np.tri(length, dtype=bool), weights, np.nan)
    return axes.imshow(visible, norm=norm, cmap="viridis", interpolation="nearest")


def _shades(weights: Float[np.ndarray, "T T"], rows: int = 24) -> str:
    """Weights as shaded text. Each is relative to the largest in its row, on a log scale that spans two decades."""
    at_row, at_column = (np.linspace(0, len(weights) - 1, count).astype(int) for count in (rows, 2 * rows))
    lines = []
    for i in at_row:
        shares = np.maximum(weights[i, at_column] / weights[i, : i + 1].max(), 1e-9)
        depth = np.clip((np.log10(shares) + 2) / 2 * 4, 0, 4).round().astype(int)
        lines.append("".join(" ░▒▓█"[level] for level, j in zip(depth, at_column, strict=True) if j <= i))
    return "\n".join(lines)


def _is_data_dependent(encoding: Encoding) -> bool:
    """Whether the effect depends on token content: via a context, rows of logits, or a bias from queries or keys."""
    positions = jnp.arange(4)[None]
    context = encoding.prepare(jnp.ones((1, 4, DIMS.d_model)), positions)
    if jax.tree.leaves(context) or overrides(encoding, "scores", "weights"):
        return True

    def bias(seed: int) -> Array | None:
        keys = jax.random.split(jax.random.key(seed), 3)
        q, k = (jax.random.normal(key, (1, 4, DIMS.num_heads, DIMS.head_dim)) for key in keys[:2])
        logits = jax.random.normal(keys[2], (1, DIMS.num_heads, 4, 4))
        noisy = nnx.clone(encoding)  # parameters initialized to zero would hide a dependence on the data
        params = nnx.state(noisy, nnx.Param)
        nnx.update(noisy, jax.tree.map(lambda x: x + 1 + jnp.arange(x.size).reshape(x.shape), params))
        return noisy.bias(q, k, logits, positions, positions, (None, None))

    first, second = bias(0), bias(1)
    return first is not None and bool((first != second).any())


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("setting", text, "must be FIELD=VALUE")
    return name, literal(value)
