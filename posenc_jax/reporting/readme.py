"""README's headline: the table and the figure of the study of length extrapolation, written anew from its results.

python -m posenc_jax.reporting.readme
"""

from collections import Counter
from pathlib import Path

from posenc_jax.files import replace_text
from posenc_jax.reporting.tables import extrapolation_table
from posenc_jax.results import MemberRow, read_results, read_rows, train_length

ROOT = Path(__file__).parent.parent.parent
STUDY = "experiments/results/length_extrapolation"
BEGIN = "<!-- from here to the end mark: python -m posenc_jax.reporting.readme -->\n"
END = "<!-- end mark -->\n"


def headline(root: Path) -> str:
    """The Markdown between the marks, from the results under `root`."""
    results = [row for row in read_results(root / STUDY / "results.csv") if row.scaling == "none"]
    seeds = set(Counter(row.variant for row in read_rows(root / STUDY / "members.csv", MemberRow)).values())
    means = f"means over {' or '.join(map(str, sorted(seeds)))} seeds" if seeds != {1} else "of one seed"
    return (
        f"Trained on {train_length(results)} tokens and read up to sixteen times that: bits per byte of held-out text, "
        f"{means}, ± half of a 95 % interval over texts and seeds ([report]({STUDY}/report.md), where differences are "
        "paired and far more certain):\n\n"
        f"{extrapolation_table(results, 'prefix_bits_per_byte').markdown()}\n"
        f"![Bits per byte over evaluation length]({STUDY}/figures/extrapolation.png)\n"
    )


def with_headline(readme: str, root: Path) -> str:
    """README with its headline made anew. Raises ValueError if it lacks the marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must have the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + begin + headline(root) + end + after


def main() -> None:
    path = ROOT / "README.md"
    replace_text(path, with_headline(path.read_text(encoding="utf-8"), ROOT))


if __name__ == "__main__":
    main()
