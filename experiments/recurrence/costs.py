r"""Sequential or parallel: time and memory of recurrences and of attention, against the length.

For a layer on n tokens of width d, Vaswani et al. 2017, table 1, states

    ============== ============================== ======================
    layer          operations                     steps in sequence
    ============== ============================== ======================
    self-attention O(n^2 d) (and O(n d^2) beside) O(1)
    recurrence     O(n d^2)                       O(n)
    ============== ============================== ======================

Attention's memory is O(n^2) if it holds all logits at once, and O(n) in blocks (Dao et al. 2022). Here the time and the
memory of a training step and of a forward pass are measured, with their growth. Which model is faster at a length
depends on the device: steps in sequence slow down a device with many units, operations one with few.
"""

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from flax import nnx

from configs import recurrent, rope_extrap
from experiments.recurrence import figures
from experiments.recurrence.study import Study, table
from posenc_jax.attention.dense import dense as dense_attention
from posenc_jax.config import RunConfig, TransformerConfig
from posenc_jax.encodings.base import Constant
from posenc_jax.models.transformer import Transformer
from posenc_jax.results import write_rows
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.objectives import token_losses
from posenc_jax.training.step import build_model, initial_state, make_train_step

LENGTHS = {"default": (64, 128, 256, 512, 1024, 2048, 4096, 8192), "smoke": (16, 32, 64)}
RECURRENCES = ("rnn", "lstm", "gru", "elmo")
ATTENTION, DENSE = "attention", "attention, all logits at once"
WORK: tuple[Literal["training"], Literal["inference"]] = ("training", "inference")


@dataclass(frozen=True)
class Cost:
    """One timing of one model on `batch` windows of `length` tokens.

    `work` is "training" (a training step) or "inference" (the loss of every token, without gradients). `seconds` is the
    mean of a few calls in a row. `temporary_bytes` is the memory of the compiled program beside its inputs and outputs,
    as the compiler plans it: the same in every repeat. `sequential_steps` is the number of steps of the forward pass
    that wait for each other: one per layer in attention, one per token and layer in a recurrence. It describes
    dependence, not loops: attention in blocks also takes its steps one after another on a CPU.
    """

    model: str
    work: str
    length: int
    batch: int
    repeat: int
    seconds: float
    temporary_bytes: int
    sequential_steps: int


@dataclass(frozen=True)
class Exponent:
    """The power of the length that a quantity ("seconds" or "temporary_bytes") grows by, between two lengths (tokens).

    The 95 % interval is over repeats. Memory has none, because it is the same in all repeats. The interval does not
    cover how far the growth is from a power.
    """

    model: str
    work: str
    quantity: str
    shortest: int
    longest: int
    value: float
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True)
class Crossover:
    """The length (tokens) from which on a recurrence is faster than attention, at every longer length measured.

    `length` is None if the recurrence is slower at the longest length, and `shortest` if it is faster at all lengths.
    """

    work: str
    recurrence: str
    attention: str
    shortest: int
    longest: int
    length: float | None

    def __str__(self) -> str:
        names = f"{self.work}: {self.recurrence}"
        if self.length is None:
            return f"{names} is not faster than {self.attention} at any length up to {self.longest} tokens"
        if self.length == self.shortest:
            return f"{names} is faster than {self.attention} at every length from {self.shortest} tokens"
        return f"{names} is faster than {self.attention} from about {self.length:.0f} tokens on"


def part(study: Study) -> Iterable[str]:
    cells = [name for name in RECURRENCES if name in study.models]
    rope = RunConfig.from_mapping(rope_extrap.get_config(f"size={study.size}").to_dict())
    configs = {ATTENTION: rope}
    for cell in cells:
        recipe = recurrent.get_config(f"size={study.size},cell={cell}")
        configs[cell] = RunConfig.from_mapping(recipe.to_dict())
    repeats = 5 if study.size == "default" else 2
    rows = measure(configs, LENGTHS[study.size], dense={DENSE: rope}, repeats=repeats)
    write_rows(study.output / "costs.csv", Cost, rows)
    growth = exponents(rows)
    write_rows(study.output / "cost_exponents.csv", Exponent, growth)
    yield "## Sequential or parallel"
    yield (
        "One window of each length through a training step, and through a forward pass (inference), in alternating "
        "repeats, on models of as many parameters. The exponent is the slope of time, and of the compiled program's "
        "temporary memory, on two logarithmic axes over the longer half of the lengths (95 % interval over repeats). "
        "ELMo trains both directions; its inference is of the forward half. "
        "*In sequence*: steps of the forward pass that wait for each other, at the longest length."
    )
    yield table(("model", "work", "time ~ n^", "memory ~ n^", "in sequence"), _growth_rows(rows, growth))
    lines = crossovers(rows, cells, ATTENTION) + crossovers(rows, [ATTENTION], DENSE)
    yield "\n".join(f"- {line}." for line in lines)
    times = medians(rows)
    rising = ", ".join(f"{_last_slope(times[ATTENTION, work]):.2f} in {work}" for work in WORK)
    yield (
        f"Attention's exponent still rises towards 2, as its other layers, whose time is linear, weigh ever less: "
        f"between the two longest lengths it is {rising}. Where recurrences are faster depends on how many "
        "operations the device does side by side: attention's do not wait for those of earlier tokens."
    )
    for quantity, label in (("seconds", "seconds"), ("temporary_bytes", "temporary memory (bytes)")):
        found = medians(rows, quantity)
        curves = {work: {model: own for (model, its), own in found.items() if its == work} for work in WORK}
        powers = {work: {e.model: e.value for e in growth if (e.work, e.quantity) == (work, quantity)} for work in WORK}
        figure = figures.growth(curves, label, powers)
        yield study.save(figure, f"cost_{quantity}", f"{label.capitalize()} against length")


def _growth_rows(rows: Sequence[Cost], growth: Sequence[Exponent]) -> Iterable[tuple[str, ...]]:
    found = {(e.model, e.work, e.quantity): e for e in growth}
    for model, work in dict.fromkeys((row.model, row.work) for row in rows):
        time, memory = (found[model, work, quantity] for quantity in ("seconds", "temporary_bytes"))
        interval = "" if time.ci_low is None else f" ({time.ci_low:.2f} to {time.ci_high:.2f})"
        steps = max(row.sequential_steps for row in rows if row.model == model)
        yield model, work, f"{time.value:.2f}{interval}", f"{memory.value:.2f}", f"{steps:,}"


def _last_slope(seconds: Mapping[int, float]) -> float:
    """The power of the length that time grows by between the two longest lengths."""
    (short, before), (long, after) = list(seconds.items())[-2:]
    return math.log(after / before) / math.log(long / short)


def measure(
    configs: Mapping[str, RunConfig],
    lengths: Sequence[int],
    *,
    batch: int = 1,
    repeats: int = 5,
    seconds: float = 0.2,
    dense: Mapping[str, RunConfig] | None = None,
    dense_up_to: int = 2048,
) -> list[Cost]:
    """Time every model at every length. Each repeat visits all of them, so that other load of the machine is shared.

    Args:
      configs: runs by name; their models, encodings, positions and optimizers count.
      lengths: tokens of a window, increasing.
      batch: windows.
      seconds: approximate time of the calls in a row that one timing averages. There is at least one call.
      dense: runs of transformers that hold all logits at once at every length, up to `dense_up_to` tokens.
    """
    short = [length for length in lengths if length <= dense_up_to]
    plans = [(name, config, False, lengths) for name, config in configs.items()]
    plans += [(name, config, True, short) for name, config in (dense or {}).items()]
    programs: list[_Program] = []
    for name, config, is_dense, own_lengths in plans:
        for length in own_lengths:
            print(f"compiling {name} at {length} tokens", file=sys.stderr, flush=True)
            programs += _programs(name, config, length, batch, dense=is_dense)
    calls = [max(1, round(seconds / _mean_seconds(program, 1))) for program in programs]
    rows = []
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        for program, count in zip(programs, calls, strict=True):
            rows.append(replace(program.cost, repeat=repeat, seconds=_mean_seconds(program, count)))
    return rows


class _Program(NamedTuple):
    """A compiled program to call, and its costs but for the time."""

    cost: Cost
    run: Callable[[], None]


def _mean_seconds(program: _Program, calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        program.run()
    return (time.perf_counter() - begun) / calls


def _programs(name: str, config: RunConfig, length: int, batch: int, *, dense: bool) -> list[_Program]:
    config = replace(config, training=replace(config.training, length=length, batch_size=batch, grad_accum_steps=1))
    graphdef = structure(config, dense=dense)
    optimizer = optimizers.build(config.optimizer, total_steps=1000, warmup_steps=10)
    state = initial_state(config, optimizer)
    vocab_size = config.data.vocab_size
    tokens = jax.random.randint(jax.random.key(0), (batch, length + 1), 0, vocab_size)
    train_step = make_train_step(config, graphdef, optimizer, jnp.ones(vocab_size, jnp.int32))
    # A copy: the training step is given its state to overwrite.
    arrays = jax.tree.map(jnp.copy, (state["params"], state["constants"]))

    def read(params, constants, tokens):
        return token_losses(nnx.merge(graphdef, params, constants), tokens)

    train = jax.jit(train_step, donate_argnums=0).lower(state, tokens).compile()
    inference = jax.jit(read).lower(*arrays, tokens).compile()

    def run_training() -> None:
        nonlocal state
        state, metrics = train(state, tokens)
        jax.block_until_ready(metrics)

    def run_inference() -> None:
        jax.block_until_ready(inference(*arrays, tokens))

    programs = []
    for work, compiled, run in zip(WORK, (train, inference), (run_training, run_inference), strict=True):
        plan = compiled.memory_analysis()
        assert plan is not None  # every backend that runs this package has one
        run()
        steps = sequential_steps(config, length)
        cost = Cost(name, work, length, batch, 0, math.nan, int(plan.temp_size_in_bytes), steps)
        programs.append(_Program(cost, run))
    return programs


def structure(config: RunConfig, *, dense: bool) -> nnx.GraphDef:
    """A run's model without arrays; a `dense` one holds all logits at once at every length."""
    model = nnx.eval_shape(lambda: build_model(config, jnp.zeros((), jnp.uint32)))
    if dense:
        if not isinstance(model, Transformer):
            raise ValueError(f"{config.model.architecture} has no attention that could be dense")
        for layer in range(model.num_layers):
            getattr(model, f"block_{layer}").attention.attend = dense_attention
    return nnx.split(model, nnx.Param, Constant)[0]


def sequential_steps(config: RunConfig, length: int) -> int:
    """Steps of a forward pass over `length` tokens that wait for each other."""
    return config.model.num_layers * (1 if isinstance(config.model, TransformerConfig) else length)


def exponents(rows: Sequence[Cost]) -> list[Exponent]:
    """The growth with length of every model's time and memory over the upper half of its lengths.

    An exponent is the least-squares slope of the logarithm on the logarithm of the length. That of seconds is the mean
    of the slopes of the repeats, with their t interval.
    """
    found = []
    for key, own in _grouped(rows, lambda row: (row.model, row.work)):
        lengths = sorted({row.length for row in own})
        upper = lengths[len(lengths) // 2 :]
        if len(upper) < 2:
            raise ValueError(f"an exponent takes three lengths or more, not {lengths} of {key[0]}")
        kept = sorted((row for row in own if row.length in upper), key=lambda row: row.length)
        repeats = [repeat for _, repeat in _grouped(kept, lambda row: row.repeat)]
        slopes = [_slope(upper, [row.seconds for row in repeat]) for repeat in repeats]
        memory = _slope(upper, [row.temporary_bytes for row in repeats[0]])
        mean, interval = statistics.fmean(slopes), (None, None)
        if len(slopes) > 1:
            low, high = scipy.stats.t.interval(0.95, len(slopes) - 1, mean, scipy.stats.sem(slopes))
            interval = float(low), float(high)
        found.append(Exponent(*key, "seconds", upper[0], upper[-1], mean, *interval))
        found.append(Exponent(*key, "temporary_bytes", upper[0], upper[-1], memory, None, None))
    return found


def _slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def medians(rows: Iterable[Cost], quantity: str = "seconds") -> dict[tuple[str, str], dict[int, float]]:
    """The median of a quantity over repeats, by (model, work) and, in increasing order, length."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    ordered = sorted(rows, key=lambda row: row.length)
    for (model, work, length), same in _grouped(ordered, lambda row: (row.model, row.work, row.length)):
        found.setdefault((model, work), {})[length] = statistics.median(getattr(row, quantity) for row in same)
    return found


def crossovers(rows: Sequence[Cost], recurrences: Sequence[str], attention: str) -> list[Crossover]:
    """Where each recurrence becomes faster than a model of attention, by median seconds at the lengths that both read.

    Between two lengths, seconds are interpolated as a power of the length.
    """
    times = medians(rows)
    found = []
    for work, recurrence in itertools.product(WORK, recurrences):
        slow, fast = times.get((attention, work)), times.get((recurrence, work))
        if slow is None or fast is None:
            continue
        lengths = sorted(slow.keys() & fast.keys())
        gains = [math.log(slow[length] / fast[length]) for length in lengths]  # above 0: the recurrence is faster
        found.append(Crossover(work, recurrence, attention, lengths[0], lengths[-1], _last_rise(lengths, gains)))
    return found


def _last_rise(lengths: Sequence[int], gains: Sequence[float]) -> float | None:
    """The length from which on gains are above 0; None if the last is not."""
    if gains[-1] <= 0:
        return None
    i = max((i for i, gain in enumerate(gains) if gain <= 0), default=None)
    if i is None:
        return float(lengths[0])
    share = -gains[i] / (gains[i + 1] - gains[i])
    return math.exp(math.log(lengths[i]) + share * math.log(lengths[i + 1] / lengths[i]))


def _grouped(rows: Iterable[Cost], key: Callable[[Cost], Any]) -> list[tuple[Any, list[Cost]]]:
    """Rows with the same key, in the order in which keys first appear."""
    groups: dict[Any, list[Cost]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())
