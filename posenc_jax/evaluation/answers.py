"""The answers of a model to samples of a task: which of the scored tokens it predicts.

A causal model is given the tokens before each. A bidirectional one predicts all answers of a sample at once.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from posenc_jax.config import RunConfig
from posenc_jax.evaluation import extrapolation
from posenc_jax.evaluation.scoring import ScoredModel, evaluation_positions
from posenc_jax.evaluation.window_sums import Recall


def under_rules(model: ScoredModel, samples: Int[np.ndarray, "W P N"], length: int) -> dict[str, Recall | None]:
    """The answers under each scaling rule of the evaluation; None if the model cannot read so many tokens.

    See `answer` for the arguments.
    """
    found: dict[str, Recall | None] = {}
    by_rule: dict[str, Recall] = {}
    for scaling in model.config.evaluation.rope_scalings:
        rule = extrapolation.rule_at(model.config, scaling, length)
        if rule not in by_rule and can_read(model, samples, length):
            by_rule[rule] = answer(extrapolation.scaled(model, rule), samples, length)
        found[scaling] = by_rule.get(rule)
    return found


def can_read(model: ScoredModel, samples: Int[np.ndarray, "W P N"], length: int) -> bool:
    """Whether the positions of samples, of `length` read tokens, fit the table of the encoding."""
    own = own_positions(model.config, samples)
    if own is None:
        return extrapolation.can_read(model, length)
    table = nnx.merge(model.scorer.graphdef, model.params, model.constants).table_length
    return table is None or int(own.max()) < table


def answer(model: ScoredModel, samples: Int[np.ndarray, "W P N"], length: int) -> Recall:
    """The nats of the scored tokens of each sample, how many are the most likely ones, and their number.

    Args:
      model: the model, perhaps under a scaling rule.
      samples: tokens, 1 for those that are scored, and perhaps places: see `posenc_jax.tasks.base.samples`.
      length: the tokens that the model reads, N - 1 without the padding. It determines the positions.
    """
    tokens, scored = samples[:, 0], samples[:, 1, 1:] > 0
    places = own_positions(model.config, samples)
    if places is None:
        places = _places(model.config, length, scored.shape[1])
    arrays = model.params, model.constants
    hidden = scored if model.config.masks_tokens else None
    nats, predicted = model.scorer.predictions(*arrays, tokens, places, hidden, last=scored.shape[1])
    right = (predicted == tokens[:, 1:]).sum(1, np.float64, where=scored)
    return Recall(nats.sum(1, np.float64, where=scored), right, scored.sum(1, np.float64))


def trace(model: ScoredModel, count: int, length: int) -> None:
    """Trace the program for this many samples of `length` read tokens, with abstract arrays."""
    options = {"masks_tokens": model.config.masks_tokens, "last": length}
    own = np.zeros((count, length), np.int32)  # in place of those of samples
    places = own if model.config.positions.of_task else _places(model.config, length, length)
    model.scorer.trace(*model[2:], count, length, places, **options)


def own_positions(config: RunConfig, samples: Int[np.ndarray, "W P N"]) -> Int[np.ndarray, "W N-1"] | None:
    """The positions of the tokens that the model reads, None if samples have none of their own."""
    if not config.positions.of_task:
        return None
    return samples[:, 2, 1:] if config.masks_tokens else samples[:, 2, :-1]


def _places(config: RunConfig, length: int, padded: int) -> Array | None:
    """The positions of `length` tokens, repeating the last one for padding, which no earlier token reads."""
    places = evaluation_positions(config, length)
    if places is None:
        return None
    return jnp.pad(places, [(0, 0)] * (places.ndim - 1) + [(0, padded - length)], mode="edge")
