r"""The search for LongRoPE's factors: how much each pair of a trained model should be slowed down to read further.

Evolution over vectors lambda [pairs], with 1 <= lambda_0 <= ... <= lambda_{d/2-1}: the best vectors so far have
children, by mutation (some factors drawn anew between their neighbours) and by crossover (each factor from one of two
parents), and children that do better take their place. Source: Ding et al. 2024, and the released code for the
sizes. Differs from it: the first vectors are three (position interpolation, NTK-aware, YaRN), as the paper says, where
the code has YaRN's alone; and no position keeps its own frequencies.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from posenc_jax.config import RunConfig
from posenc_jax.encodings import frequencies
from posenc_jax.evaluation.extrapolation import scaled_constants
from posenc_jax.evaluation.scoring import Scorer

Factors = tuple[float, ...]

CHANGED = 0.3  # the chance of each factor to be drawn anew in a mutation
TRIES = 20  # for a child that was not seen before


def search(
    loss: Callable[[Factors], float],
    initial: Float[np.ndarray, "n pairs"],
    *,
    largest: float,
    population: int = 64,
    iterations: int = 40,
    mutations: int = 16,
    crossovers: int = 16,
    parents: int = 32,
    step: float = 0.01,
    seed: int = 0,
) -> tuple[Factors, float]:
    """The best factors found, and their loss: never worse than the best of `initial`.

    Args:
      loss: of a model under given factors; called once for each vector.
      initial: vectors that do not decrease; mutations of them fill the first population.
      largest: no mutation draws a factor above it.
      population: vectors of the first generation.
      iterations: generations after the first.
      mutations: children by mutation, in each generation.
      crossovers: children by crossover, in each generation.
      parents: the best vectors, that have children and stay.
      step: factors are drawn in multiples of it above their lower neighbour.
      seed: of all draws.
    """
    rng = np.random.default_rng(seed)
    losses: dict[Factors, float] = {}

    def mutated(factors: Factors) -> Factors:
        return _unseen(lambda: mutate(rng, factors, largest, step), losses)

    def add(factors: Factors) -> None:
        if factors not in losses:
            losses[factors] = loss(factors)

    first = [tuple(map(float, vector)) for vector in initial]
    for i in range(max(population, len(first))):
        add(first[i] if i < len(first) else mutated(first[i % len(first)]))
    for _ in range(iterations):
        best = sorted(losses, key=losses.__getitem__)[:parents]
        for _ in range(mutations):
            add(mutated(best[rng.integers(len(best))]))
        for _ in range(crossovers if len(best) > 1 else 0):
            better, other = (best[i] for i in sorted(rng.choice(len(best), 2, replace=False)))
            child = _unseen(lambda better=better, other=other: crossover(rng, better, other), losses)
            add(mutated(better) if child in losses else child)
    return min(losses.items(), key=lambda item: item[1])


def initial_factors(head_dim: int, base: float, length: int, factor: float) -> Float[np.ndarray, "3 pairs"]:
    """The factors by which position interpolation, NTK-aware and YaRN read `factor` times the training length."""
    theta, _ = frequencies.none(head_dim, base, length)
    rules = frequencies.linear, frequencies.ntk, frequencies.yarn
    factors = np.stack([theta / rule(head_dim, base, length, factor=factor)[0] for rule in rules])
    return np.maximum.accumulate(np.maximum(factors, 1), axis=1)  # but for rounding, they are so already


def model_loss(
    config: RunConfig, scorer: Scorer, params: Any, constants: Any, windows: Int[np.ndarray, "W N"]
) -> Callable[[Factors], float]:
    """The mean loss (nats per token) of a RoPE model on whole windows, as a function of its factors."""
    factor = max(1.0, (windows.shape[1] - 1) / config.pretrained_reach)

    def loss(factors: Factors) -> float:
        rule = frequencies.Scaling("longrope", (("factors", factors), ("factor", factor)))
        return float(scorer(params, scaled_constants(config, constants, str(rule)), windows).mean())

    return loss


def mutate(rng: np.random.Generator, factors: Factors, largest: float, step: float) -> Factors:
    """Some factors drawn anew, one after the other, each between its neighbours: the order is kept."""
    child = [1.0, *factors, max(largest, factors[-1])]
    for m in range(1, len(child) - 1):
        if rng.random() < CHANGED:
            low, high = child[m - 1], child[m + 1]
            child[m] = min(high, low + step * int(rng.integers(int((high - low) / step) + 1)))
    return tuple(child[1:-1])


def crossover(rng: np.random.Generator, better: Factors, other: Factors) -> Factors:
    """Each factor from either parent, raised where the order would break."""
    chosen = np.where(rng.random(len(better)) < 0.5, better, other)
    return tuple(map(float, np.maximum.accumulate(chosen)))


def _unseen(draw: Callable[[], Factors], seen: dict[Factors, float]) -> Factors:
    """A draw that was not seen before, or the last of several that all were."""
    child = draw()
    for _ in range(TRIES):
        if child not in seen:
            break
        child = draw()
    return child
