"""What the numbers of a report say, as sentences and rankings in Markdown."""

from collections.abc import Iterable, Iterator, Sequence

from posenc_jax.reporting.tables import BEYOND_TABLE, Cell, Table, escape_markdown, format_value
from posenc_jax.results import ANSWERS, Result, accuracy_names, by_curve, curve_names, interval, ranked, train_length

GAIN_METRIC = "context_gain_bits_per_byte"
CHANGE_METRIC = "prefix_change_bits_per_byte"
GOOD = 0.9  # the share of right answers that a model must surely have at a size to be called good there
RULES_READING = (
    "Scaling rules, best first: loss over the whole window minus that without scaling, in bits per byte ± half the "
    "width of its 95 % interval. Bold: better than no scaling."
)
NO_INTERVALS = "All windows are of one document, so there are no intervals, and nothing can be said about other texts."


def findings(results: Sequence[Result]) -> Iterator[str]:
    """Findings as Markdown sentences: on context and answers, or only that there are no intervals."""
    if without_intervals(results):
        yield NO_INTERVALS
    else:
        yield from gain_findings(results)
        yield from answer_findings(results)


def rules_ranking(results: Sequence[Result]) -> Iterator[str]:
    """A table of the scaling rules, ranked by their change at the longest length, if there are any."""
    curves, unit = by_curve(results, CHANGE_METRIC), train_length(results)
    lengths = sorted({length for rows in curves.values() for length in rows if length > unit})
    if not lengths:
        return
    order = ranked((rows.get(lengths[-1]) for rows in curves.values()), CHANGE_METRIC)
    names = curve_names(results)
    rows = []
    for name in (names[row.encoding, row.scaling] for row in order):
        cells = [curves[name].get(length) for length in lengths]
        marked = (Cell("" if row is None else format_value(row), row is not None and _is_below(row)) for row in cells)
        rows.append((Cell(name), *marked))
    yield RULES_READING
    yield Table("", ("scaling rule", *(f"{n} ({n / unit:.3g}x)" for n in lengths)), tuple(rows)).markdown()


def _is_below(row: Result) -> bool:
    ends = interval(row)
    return ends is not None and ends[1] < 0


def without_intervals(results: Iterable[Result]) -> bool:
    """Whether no value has an interval, for example because all windows are of one document."""
    valued = [row for row in results if row.value is not None]
    return bool(valued) and not any(map(interval, valued))


def gain_findings(results: Sequence[Result]) -> Iterator[str]:
    """The effect of context past the training length, such as "uses it at 512 tokens", and the curves that show it."""
    verdicts: dict[str, list[str]] = {}
    for name, rows in by_curve(results, GAIN_METRIC).items():
        lengths: dict[str, list[int]] = {}
        for length, row in rows.items():
            verb = BEYOND_TABLE if row.value is None else _sign(row, "breaks", "survives", "uses it")
            lengths.setdefault(verb, []).append(length)
        verdict = "; ".join(f"{verb} at {listing(held)} tokens" for verb, held in lengths.items())
        verdicts.setdefault(verdict, []).append(bold(name))
    for verdict, names in verdicts.items():
        yield f"{listing(names)}, given more context than in training: {verdict}."


def _sign(result: Result, below: str, around: str, above: str) -> str:
    """`below`, `around` or `above` if the interval of a result is below zero, contains zero or is above zero."""
    ends = interval(result)
    if ends is None:
        return "without an interval"
    return below if ends[1] < 0 else above if ends[0] > 0 else around


def answer_findings(results: Sequence[Result]) -> Iterator[str]:
    """Up to which size the answers of each curve are good, as Markdown sentences."""
    trained, least = train_length(results), f"{100 * GOOD:.0f} %"
    for case in ANSWERS:
        _, exact = accuracy_names(case)
        verdicts: dict[str, list[str]] = {}
        for name, rows in by_curve(results, exact).items():
            reached = None
            for size, row in rows.items():
                ends = interval(row)
                if ends is None or ends[0] < GOOD:
                    break
                reached = size
            if reached is None:
                told = f"fewer than {least} of the answers may be right at the smallest size, {min(rows)}"
            else:
                told = f"at least {least} of the answers are right up to size {reached} ({reached / trained:.3g}x)"
            verdicts.setdefault(told, []).append(f"**{escape_markdown(name)}**")
        among = "" if case == "answers" else f", in samples {ANSWERS[case]}"
        for told, names in verdicts.items():
            yield f"{listing(names)}{among}: {told}."


def bold(name: str) -> str:
    """A name in bold Markdown."""
    return f"**{escape_markdown(name)}**"


def listing(items: Iterable[object]) -> str:
    """The items as one text, such as "the first, the second and the last"."""
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last
