r"""Search LongRoPE's factors for a trained model: how much to slow down each RoPE pair to read longer text.

    python -m experiments.longrope_search runs/rope_extrap-rope-... --length=2048
    python -m experiments.longrope_search smollm2 --path=FOLDER --length=16384 --windows=2 --population=8
    python -m experiments.longrope_search smollm2 --path=FOLDER --length=16384 --needles

The model is what `config.init_from` takes. The search evaluates factors on windows of the validation split. The table
compares the factors that it found with the rules that it started from, on the test split. The text and its splits are
those of the run. Of a text in `--path`, or of Python's source text for a model of another project, each of the two
splits has about two fifths. The last line is the rule found, as a value for `--config.evaluation.rope_scalings`.

The search is an evolutionary search over vectors lambda [pairs] with 1 <= lambda_0 <= ... <= lambda_{d/2-1}. The best
vectors so far have children, by mutation (some factors are drawn again between their neighbours) and by crossover (each
factor comes from one of two parents). Children with a lower loss replace their parents. Source: Ding et al. 2024, and
the released code for the sizes at a population of 64. Two things differ from the code: the first vectors are position
interpolation, NTK-aware and YaRN, as the paper says, and not only YaRN; and no position keeps the original frequencies.

With --needles it is the search of LongRoPE2 (Shang et al. 2025). The loss is that of the answers in needle texts: the
digits of a number that is hidden in each window and asked for at its end. Pairs from a critical one on are slowed down
by at least the extension, which is the length divided by that of training. By default the critical pair is the first
that does not turn once in training; the paper finds that an earlier one can be better. As in the first search, the
first vectors are the three rules, here raised to the bound, and no mutation exceeds twice the extension.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from rich.console import Console

from configs import pretrained
from posenc_jax import command
from posenc_jax.config import RunConfig
from posenc_jax.data import pipeline
from posenc_jax.distributed import sharding
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.rope_theory import critical_dimension
from posenc_jax.evaluation import extrapolation, retrieval_tasks
from posenc_jax.evaluation.run_results import result_rows
from posenc_jax.evaluation.scoring import ScoredModel, Scorer
from posenc_jax.reporting.tables import extrapolation_table
from posenc_jax.runs import sources
from posenc_jax.schema import ConfigError
from posenc_jax.training.step import abstract_model, initial_constants

Factors = tuple[float, ...]

STEP = 0.01  # mutations draw factors in multiples of this above their lower neighbour
CHANGED = 0.3  # probability that a mutation draws a factor again
TRIES = 20  # maximum number of draws to find a child that was not seen before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", metavar="MODEL", help="a model with RoPE: a workdir, a Hugging Face folder, a .gguf file, or smollm2"
    )
    parser.add_argument("--path", default="", help="a text, as config.data.path; default: the text of the run")
    parser.add_argument(
        "--length", type=command.whole(2), help="window length in tokens; default: the longest evaluation length"
    )
    parser.add_argument(
        "--windows", type=command.count, default=5, help="validation windows on which each vector is evaluated"
    )
    parser.add_argument("--population", type=command.whole(2, 4096), default=64, help="vectors in the first generation")
    parser.add_argument("--iterations", type=command.whole(0, 10_000), default=10, help="generations after the first")
    parser.add_argument("--needles", action="store_true", help="search as LongRoPE2: by needles, one in each window")
    parser.add_argument(
        "--critical_pair", type=command.whole(0), help="first pair of RoPE with the bound of LongRoPE2, from 0 on"
    )
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Search, evaluate and print. Raises ConfigError."""
    config = settings(args.model, args.path)
    encoding = config.encoding
    if encoding.name != "rope" or config.training.drope.amount:
        raise ConfigError("config.encoding.name", encoding.name, "must be rope, and not dropped during training")
    own = encoding.hyperparameters
    length, reach = args.length or config.evaluation.lengths[-1], config.pretrained_reach
    if length < config.evaluation.tail:
        raise ConfigError("--length", length, f"must be at least config.evaluation.tail = {config.evaluation.tail}")
    rows = config.training.batch_size // config.training.grad_accum_steps
    sharding.divide_cpu(config.training.cpu_devices, rows)
    mesh = sharding.make_mesh(rows)
    source, dataset = sources.of_run(config), sources.prepare_text(config)
    assert source is not None
    arrays = {"constants": initial_constants(config, mesh)} | source.load(config, mesh)
    scorer = Scorer(abstract_model(config)[0], mesh, config.evaluation.batch_tokens)
    model = ScoredModel(config, scorer, arrays["params"], arrays["constants"])
    splits, field = dataset.splits, "--length"
    windows = pipeline.evaluation_windows(splits["validation"], length=length, count=args.windows, field=field)
    factor, head_dim = max(1.0, length / reach), int(own.fraction * config.model.head_dim)
    pairs = critical = head_dim // 2
    tokens, scored = windows.tokens, np.ones((len(windows.tokens), length), bool)
    if args.needles:
        tokens, scored = needles(retrieval_tasks.Source(dataset.tokenizer, tokens), length, args.windows, field)
        critical = critical_dimension(head_dim, own.base, reach) // 2
    if args.critical_pair is not None:
        critical = args.critical_pair
    if critical > pairs:
        raise ConfigError("--critical_pair", critical, f"must be at most {pairs}, the number of pairs")
    factors, best = search(
        model_loss(model, tokens, scored),
        initial_factors(head_dim, own.base, reach, factor),
        lowest=[1.0 if m < critical else factor for m in range(pairs)],
        largest=2 * factor,
        population=args.population,
        iterations=args.iterations,
        seed=config.seed,
    )
    print(f"validation: {best:.4f} nats per token with the factors found")

    rule = str(frequencies.Scaling("longrope", (("factors", factors), ("factor", factor))))
    scalings = ("none", "linear", "ntk", "yarn", rule)
    lengths = (*(n for n in config.evaluation.lengths if n < length), length)
    evaluation = dataclasses.replace(config.evaluation, lengths=lengths, rope_scalings=scalings)
    test = pipeline.evaluation_windows(splits["test"], length=length, count=evaluation.windows, field=field)
    config, token_bytes = dataclasses.replace(config, evaluation=evaluation), dataset.tokenizer.token_bytes
    measured = extrapolation.measure_lengths(model._replace(config=config), test.tokens, token_bytes)
    results = result_rows(config, measured, test.documents)
    shown = [dataclasses.replace(row, scaling="longrope") if row.scaling == rule else row for row in results]
    extrapolation_table(shown, "prefix_bits_per_byte").print(Console())
    print(rule)


def settings(model: str, path: str) -> RunConfig:
    """Those of configs/pretrained.py for a model, with a validation split. Raises ConfigError."""
    config = pretrained.get_config()
    config.init_from, config.data.path = model, path or None
    if path or not sources.is_run(Path(model)):
        config.data.validation_fraction = config.data.test_fraction = 0.4
    try:
        return RunConfig.from_mapping(sources.resolve(config.to_dict()))
    except ConfigError as error:
        raise sources.error_of("MODEL", model, error) from error


def search(
    loss: Callable[[Factors], float],
    initial: Float[np.ndarray, "n pairs"],
    *,
    largest: float,
    lowest: Sequence[float] | float = 1.0,
    population: int = 64,
    iterations: int = 40,
    seed: int = 0,
) -> tuple[Factors, float]:
    """Return the best factors and their loss, which is at most the lowest loss of `initial`.

    Args:
      loss: the loss of a model with given factors; called once per vector.
      initial: non-decreasing vectors, which are raised to `lowest`; their mutations fill the first population.
      largest: upper bound of the factors that mutations draw.
      lowest: lower bounds of the factors, non-decreasing, or one for all.
      population: vectors of the first generation.
      iterations: generations after the first. In each, the better half of a population has children: a quarter of a
        population by mutation, and a quarter by crossover.
      seed: seed of all draws.
    """
    rng, children = np.random.default_rng(seed), max(1, population // 4)
    losses: dict[Factors, float] = {}
    bounds = np.broadcast_to(lowest, initial.shape[1])

    def mutated(factors: Factors) -> Factors:
        return _unseen(lambda: mutate(rng, factors, bounds, largest), losses)

    def add(factors: Factors) -> None:
        if factors not in losses:
            losses[factors] = loss(factors)

    first = [tuple(map(float, vector)) for vector in np.maximum(initial, bounds)]
    for i in range(max(population, len(first))):
        add(first[i] if i < len(first) else mutated(first[i % len(first)]))
    for _ in range(iterations):
        best = sorted(losses, key=losses.__getitem__)[: 2 * children]
        for _ in range(children):
            add(mutated(best[rng.integers(len(best))]))
        for _ in range(children if len(best) > 1 else 0):
            better, other = (best[i] for i in sorted(rng.choice(len(best), 2, replace=False)))
            child = _unseen(lambda better=better, other=other: crossover(rng, better, other), losses)
            add(mutated(better) if child in losses else child)
    return min(losses.items(), key=lambda item: item[1])


def initial_factors(head_dim: int, base: float, length: int, factor: float) -> Float[np.ndarray, "3 pairs"]:
    """Factors of position interpolation, NTK-aware scaling and YaRN for `factor` times the training length."""
    theta, _ = frequencies.none(head_dim, base, length)
    rules = frequencies.linear, frequencies.ntk, frequencies.yarn
    factors = np.stack([theta / rule(head_dim, base, length, factor=factor)[0] for rule in rules])
    return np.maximum.accumulate(np.maximum(factors, 1), axis=1)  # removes rounding


def needles(
    source: retrieval_tasks.Source, length: int, count: int, field: str
) -> tuple[Int[np.ndarray, "W N"], Bool[np.ndarray, "W N-1"]]:
    """Texts with a needle each, at depths that are spread evenly, and which tokens after the first are the answers.

    Raises ConfigError for `field` if the length is too short.
    """
    texts = retrieval_tasks.trials("needle", source, length, count, count, field)
    tokens = np.stack([text.tokens for text in texts])
    scored = np.zeros((count, length), bool)
    for row, text in zip(scored, texts, strict=True):
        for start, stop in text.items:
            row[start - 1 : stop - 1] = True
    return tokens, scored


def model_loss(
    model: ScoredModel, windows: Int[np.ndarray, "W N"], scored: Bool[np.ndarray, "W N-1"]
) -> Callable[[Factors], float]:
    """Loss (nats per token) of a RoPE model as a function of its factors: the mean over windows of their own means.

    Of the tokens after the first of each window, those in `scored` count.
    """
    factor = max(1.0, (windows.shape[1] - 1) / model.config.pretrained_reach)

    def loss(factors: Factors) -> float:
        rule = frequencies.Scaling("longrope", (("factors", factors), ("factor", factor)))
        own = extrapolation.scaled(model, str(rule))
        return float(own.scorer(own.params, own.constants, windows).mean(axis=1, where=scored).mean())

    return loss


def mutate(rng: np.random.Generator, factors: Factors, lowest: Float[np.ndarray, "pairs"], largest: float) -> Factors:
    """Draw some factors again, one after another, each between its neighbours, so that the order is kept.

    None is drawn below its `lowest`, and the last is at most the `largest` or its own value.
    """
    child = [1.0, *factors, max(largest, factors[-1])]
    for m in range(1, len(child) - 1):
        if rng.random() < CHANGED:
            low, high = max(child[m - 1], float(lowest[m - 1])), child[m + 1]
            child[m] = min(high, low + STEP * int(rng.integers(int((high - low) / STEP) + 1)))
    return tuple(child[1:-1])


def crossover(rng: np.random.Generator, better: Factors, other: Factors) -> Factors:
    """Take each factor from either parent, and raise it where it would be below the one before."""
    chosen = np.where(rng.random(len(better)) < 0.5, better, other)
    return tuple(map(float, np.maximum.accumulate(chosen)))


def _unseen(draw: Callable[[], Factors], seen: dict[Factors, float]) -> Factors:
    """A draw that was not seen before, or the last of TRIES draws."""
    child = draw()
    for _ in range(TRIES):
        if child not in seen:
            break
        child = draw()
    return child


if __name__ == "__main__":
    command.run(main)
