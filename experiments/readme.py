"""Writes the generated parts of the pages, from the code and from committed results.

python -m experiments.readme

README.md gets the encodings by the place where they act, and their number. It also gets the figure and a table of a
trained model past its context, and a short table of the length extrapolation study, of which docs/results.md has all
losses. docs/encodings/overview.md gets the table of all encodings and the figure of their attention weights. Each
generated part of a page stands between two marks.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import past_context
from posenc_jax import catalogue, encodings
from posenc_jax.files import atomic_write_text
from posenc_jax.reporting.tables import Table, extrapolation_table
from posenc_jax.results import MemberRow, curve_names, read_results, read_rows, train_length

ROOT = Path(__file__).parent.parent
STUDY = "experiments/results/length_extrapolation"
REAL = "experiments/results/pretrained_extension"
FIGURE = "docs/past_context.png"
MAPS = "docs/encodings/maps.png"
BEGIN = "<!-- from here to the end mark: python -m experiments.readme -->\n"
END = "<!-- end mark -->\n"
SHOWN = ("kerple", "t5", "fox", "rope")  # in the short table
SHOWN_COLUMNS = 4  # of the table of a trained model: the rule, its loss, the difference to none, and the gain
RULES = ("none", "linear", "ntk", "yarn", "llama3")  # of the trained model, in README.md


def number_of_encodings(root: Path) -> str:
    """The number in the introduction of README.md."""
    return str(len(encodings.names()))


def encodings_by_place(root: Path) -> str:
    """The table of README.md: the encodings that act on each part of attention, with their sources."""
    places: dict[str, list[str]] = {}
    for facts in map(catalogue.EncodingInfo.of, encodings.names()):
        source = re.sub(r" \((.*)\)$", r", \1", facts.source)  # no brackets in brackets
        places.setdefault(facts.acts_on, []).append(f"`{facts.name}` ({source})")
    return _markdown(("acts on", "encodings"), [(place, ", ".join(names)) for place, names in places.items()])


def all_encodings(root: Path) -> str:
    """The table of docs/encodings/overview.md."""
    table = catalogue.table()
    return _markdown(table.header, [(f"`{row[0].text}`", *(cell.text for cell in row[1:])) for row in table.rows])


def real_model(root: Path) -> str:
    """The part of README.md about a trained model past its context. Raises ValueError if it lacks a rule of RULES."""
    folders = past_context.committed(root / REAL)
    _, results = past_context.pooled(folders)
    table = past_context.table(results)
    rows = {row[0].text: row for row in table.rows}
    if missing := set(RULES) - set(rows):
        raise ValueError(f"{REAL} has no rule named: {', '.join(sorted(missing))}")
    losses = [row for row in results if row.metric == "prefix_bits_per_byte" and row.scaling == "none"]
    longest = max(losses, key=lambda row: row.eval_length)
    windows = f"{longest.tokens // longest.eval_length} windows of {longest.eval_length:,} tokens"
    shown = Table("", table.header[:SHOWN_COLUMNS], tuple(rows[rule][:SHOWN_COLUMNS] for rule in RULES))
    texts = ", ".join(folder.name for folder in folders)
    return (
        f"![Loss by position under each scaling rule of RoPE]({FIGURE})\n\n"
        f"SmolLM2-135M was trained on windows of {train_length(results):,} tokens. Here it reads {windows} ({texts})\n"
        "under scaling rules of RoPE, without further training. ± is half of a 95 % interval over documents.\n"
        f"[Report]({REAL}/report.md)\n\n{shown.markdown()}"
    )


def short_table(root: Path) -> str:
    """The part of README.md about the study: differences at every second length, and the gain at the longest.

    Raises ValueError if the study lacks a curve of SHOWN.
    """
    results = read_results(root / STUDY / "results.csv")
    differences = extrapolation_table(results, "difference_bits_per_byte")
    gains = extrapolation_table(results, "context_gain_bits_per_byte")
    first = next(i for i, name in enumerate(differences.header) if name.endswith("(1x)"))
    gain_of = {row[0].text: row[-1] for row in gains.rows}
    rows = {row[0].text: (*row[:1], *row[first::2], gain_of[row[0].text]) for row in differences.rows}
    if missing := set(SHOWN) - set(rows):
        raise ValueError(f"{STUDY} has no difference for: {', '.join(sorted(missing))}")
    header = (differences.header[0], *differences.header[first::2], f"context_gain, {gains.header[-1]}")
    (baseline,) = set(curve_names(results).values()) - set(rows)
    return (
        f"Models trained on {train_length(results)} tokens (1x). The first columns are `prefix` minus the `prefix` of "
        f"`{baseline}`, on the same windows and\nseeds: below zero is better. Bits per byte, {_means(root)} ± half of "
        "a 95 % interval. Bold: the best encoding.\n\n"
        f"{Table('', header, tuple(rows[name] for name in SHOWN)).markdown()}"
    )


def long_table(root: Path) -> str:
    """The part of docs/results.md: the losses of all encodings at all lengths, without scaling rules."""
    results = [row for row in read_results(root / STUDY / "results.csv") if row.scaling == "none"]
    return (
        f"`prefix` in bits per byte, after training on {train_length(results)} tokens (1x). Cells are {_means(root)} ± "
        "half of a 95 % interval over texts and seeds. Learned positions end with their table. "
        f"The [report](../{STUDY}/report.md) has the paired differences, which are far more certain:\n\n"
        f"{extrapolation_table(results, 'prefix_bits_per_byte').markdown()}\n"
        f"![Bits per byte over evaluation length](../{STUDY}/figures/extrapolation.png)\n"
    )


class Part(NamedTuple):
    """A generated part of a page, and the texts that stand before and after it."""

    write: Callable[[Path], str]
    begin: str = BEGIN
    end: str = END


PAGES = {  # the parts of each page, in order
    "README.md": (
        Part(number_of_encodings, "Its ", " positional encodings"),
        Part(lambda root: f"{real_model(root)}\n{short_table(root)}"),
        Part(encodings_by_place),
    ),
    "docs/results.md": (Part(long_table),),
    "docs/encodings/overview.md": (Part(all_encodings),),
}


def regenerated(page: str, text: str, root: Path) -> str:
    """The text of a page with its generated parts written again. Raises ValueError if the page lacks a mark."""
    written = ""
    for part in PAGES[page]:
        before, begin, rest = text.partition(part.begin)
        _, end, text = rest.partition(part.end)
        if not (begin and end):
            raise ValueError(f"{page} must have {part.begin.strip()!r} and, after it, {part.end.strip()!r}")
        written += before + begin + part.write(root) + end
    return written + text


def fingerprints() -> dict[str, str]:
    """Checksums of the numbers or settings that each figure shows. They are stored in the PNG files."""
    _, results = past_context.pooled(past_context.committed(ROOT / REAL))
    numbers = [(row.encoding, row.scaling, row.eval_length, row.value) for row in results]
    settings = [(name, encodings.default_config(name)) for name in encodings.names()]
    shown = {FIGURE: numbers, MAPS: settings}
    return {path: hashlib.sha256(repr(content).encode()).hexdigest() for path, content in shown.items()}


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are Markdown already."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *rows))


def _means(root: Path) -> str:
    seeds = set(Counter(row.variant for row in read_rows(root / STUDY / "members.csv", MemberRow)).values())
    return "of one seed" if seeds == {1} else f"means over {' or '.join(map(str, sorted(seeds)))} seeds"


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        atomic_write_text(path, regenerated(page, path.read_text(encoding="utf-8"), ROOT))
    config, results = past_context.pooled(past_context.committed(ROOT / REAL))
    figures = {FIGURE: (past_context.figure(results, config), 200), MAPS: (catalogue.gallery(), 150)}
    for path, source in fingerprints().items():
        figure, dpi = figures[path]
        figure.savefig(ROOT / path, dpi=dpi, metadata={"Source": source})


if __name__ == "__main__":
    main()
