"""Sequential or parallel: time and memory against length, of recurrences and of attention."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence

from configs import recurrent, rope_extrap
from experiments.recurrence import cost_measures, figures
from experiments.recurrence.study import Study, table
from posenc_jax.config import RunConfig
from posenc_jax.results import write_rows

LENGTHS = {"default": (64, 128, 256, 512, 1024, 2048, 4096, 8192), "smoke": (16, 32, 64)}
RECURRENCES = ("rnn", "lstm", "gru", "elmo")
ATTENTION, DENSE = "attention", "attention, all logits at once"


def part(study: Study) -> Iterable[str]:
    cells = [name for name in RECURRENCES if name in study.models]
    rope = RunConfig.from_mapping(rope_extrap.get_config(f"size={study.size}").to_dict())
    configs = {ATTENTION: rope}
    for cell in cells:
        recipe = recurrent.get_config(f"size={study.size},cell={cell}")
        configs[cell] = RunConfig.from_mapping(recipe.to_dict())
    rows = cost_measures.measure(
        configs,
        LENGTHS[study.size],
        dense={DENSE: rope},
        repeats=5 if study.size == "default" else 2,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    write_rows(study.output / "costs.csv", cost_measures.Cost, rows)
    return report(study, rows, cells)


def report(study: Study, rows: Sequence[cost_measures.Cost], cells: Sequence[str]) -> Iterable[str]:
    """The section, of what was measured."""
    exponents = cost_measures.exponents(rows)
    write_rows(study.output / "cost_exponents.csv", cost_measures.Exponent, exponents)
    yield "## Sequential or parallel"
    yield (
        "One window of each length through a training step, and through a forward pass (inference), in alternating "
        "repeats, on models of as many parameters. The exponent is the slope of time, and of the compiled program's "
        "temporary memory, on two logarithmic axes over the longer half of the lengths (95 % interval over repeats). "
        "ELMo trains both directions; its inference is of the forward half. "
        "*In sequence*: steps of the forward pass that wait for each other, at the longest length."
    )
    yield table(("model", "work", "time ~ n^", "memory ~ n^", "in sequence"), _growth(rows, exponents))
    lines = cost_measures.crossovers(rows, cells, ATTENTION) + cost_measures.crossovers(rows, [ATTENTION], DENSE)
    yield "\n".join(f"- {line}." for line in lines)
    times = cost_measures.medians(rows)
    rising = ", ".join(f"{_last_slope(times[ATTENTION, work]):.2f} in {work}" for work in cost_measures.WORK)
    yield (
        f"Attention's exponent still rises towards 2, as its other layers, whose time is linear, weigh ever less: "
        f"between the two longest lengths it is {rising}. Where recurrences are faster depends on how many "
        "operations the device does side by side: attention's do not wait for those of earlier tokens."
    )
    for quantity, label in (("seconds", "seconds"), ("temporary_bytes", "temporary memory (bytes)")):
        curves = {
            work: {
                model: own if quantity == "seconds" else _memory(rows, model, work)
                for (model, its_work), own in times.items()
                if its_work == work
            }
            for work in cost_measures.WORK
        }
        powers = {
            work: {e.model: e.value for e in exponents if (e.work, e.quantity) == (work, quantity)}
            for work in cost_measures.WORK
        }
        figure = figures.growth(curves, label, powers)
        yield study.save(figure, f"cost_{quantity}", f"{label.capitalize()} against length")


def _growth(
    rows: Sequence[cost_measures.Cost], exponents: Sequence[cost_measures.Exponent]
) -> Iterable[tuple[str, ...]]:
    found = {(e.model, e.work, e.quantity): e for e in exponents}
    for model, work in dict.fromkeys((row.model, row.work) for row in rows):
        time, memory = (found[model, work, quantity] for quantity in ("seconds", "temporary_bytes"))
        interval = "" if time.ci_low is None else f" ({time.ci_low:.2f} to {time.ci_high:.2f})"
        steps = max(row.sequential_steps for row in rows if row.model == model)
        yield model, work, f"{time.value:.2f}{interval}", f"{memory.value:.2f}", f"{steps:,}"


def _last_slope(seconds: Mapping[int, float]) -> float:
    """The power of the length that time grows by between the two longest lengths."""
    (short, before), (long, after) = list(seconds.items())[-2:]
    return math.log(after / before) / math.log(long / short)


def _memory(rows: Sequence[cost_measures.Cost], model: str, work: str) -> dict[int, float]:
    return {row.length: float(row.temporary_bytes) for row in rows if (row.model, row.work) == (model, work)}
