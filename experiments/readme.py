"""Writes the generated parts of the pages, from the committed results of the length extrapolation study.

python -m experiments.readme

README.md gets a short table of differences, and docs/results.md a table of all losses. Each table stands between two
marks in its page. docs/headline.png shows the curves of the short table.
"""

import hashlib
from collections import Counter
from pathlib import Path

from posenc_jax.files import atomic_write_text
from posenc_jax.reporting import figures
from posenc_jax.reporting.tables import Table, extrapolation_table
from posenc_jax.results import MemberRow, Result, curve_names, read_results, read_rows, train_length

ROOT = Path(__file__).parent.parent
STUDY = "experiments/results/length_extrapolation"
FIGURE = "docs/headline.png"
BEGIN = "<!-- from here to the end mark: python -m experiments.readme -->\n"
END = "<!-- end mark -->\n"
SHOWN = ("kerple", "dape", "t5", "fox", "alibi", "rope", "rope yarn", "sinusoidal")  # in the short table


def short_table(root: Path) -> str:
    """The part of README.md: differences to the baseline at every second length, and the gain at the longest.

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
        f"![Loss over evaluation length]({FIGURE})\n\n"
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


PAGES = {"README.md": short_table, "docs/results.md": long_table}


def with_results(page: str, text: str, root: Path) -> str:
    """The text of a page with its generated part written again. Raises ValueError if the page lacks the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} must have the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + begin + PAGES[page](root) + end + after


def curves(root: Path) -> list[Result]:
    """The losses of the curves in the short table, which the figure shows."""
    results = read_results(root / STUDY / "results.csv")
    names = curve_names(results)
    return [
        row for row in results if names[row.encoding, row.scaling] in SHOWN and row.metric.startswith("prefix_bits")
    ]


def fingerprint(results: list[Result]) -> str:
    """Checksum of the numbers that the figure shows. It is stored in the PNG file."""
    numbers = [(row.encoding, row.scaling, row.eval_length, row.value) for row in results]
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def _means(root: Path) -> str:
    seeds = set(Counter(row.variant for row in read_rows(root / STUDY / "members.csv", MemberRow)).values())
    return "of one seed" if seeds == {1} else f"means over {' or '.join(map(str, sorted(seeds)))} seeds"


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        atomic_write_text(path, with_results(page, path.read_text(encoding="utf-8"), ROOT))
    shown = curves(ROOT)
    figure = figures.extrapolation_panels({"": shown})
    figure.savefig(ROOT / FIGURE, dpi=200, metadata={"Source": fingerprint(shown)})


if __name__ == "__main__":
    main()
