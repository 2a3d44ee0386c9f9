"""The answers of a model to samples of a task: which of the scored tokens it predicts.

A causal model is given the tokens before each. A bidirectional one predicts all answers of a sample at once.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from posenc_jax.config import RunConfig
from posenc_jax.evaluation import extrapolation
from posenc_jax.evaluation.scoring import ScoredModel, evaluation_positions
from posenc_jax.evaluation.window_sums import Recall


def under_rules(model: ScoredModel, samples: Int[np.ndarray, "W 2 N"], length: int) -> dict[str, Recall | None]:
    """The answers under each scaling rule of the evaluation; None if the model cannot read so many tokens.

    See `answer` for the arguments.
    """
    found: dict[str, Recall | None] = {}
    by_rule: dict[str, Recall] = {}
    for scaling in model.config.evaluation.rope_scalings:
        rule = extrapolation.rule_at(model.config, scaling, length)
        if rule not in by_rule and extrapolation.can_read(model, length):
            by_rule[rule] = answer(extrapolation.scaled(model, rule), samples, length)
        found[scaling] = by_rule.get(rule)
    return found


def answer(model: ScoredModel, samples: Int[np.ndarray, "W 2 N"], length: int) -> Recall:
    """The nats of the scored tokens of each sample, how many are the most likely ones, and their number.

    Args:
      model: the model, perhaps under a scaling rule.
      samples: tokens, and 1 for those that are scored.
      length: the tokens that the model reads, N - 1 without the padding. It determines the positions.
    """
    tokens, scored = samples[:, 0], samples[:, 1, 1:] > 0
    places = _places(model.config, length, scored.shape[1])
    arrays = model.params, model.constants
    hidden = scored if model.config.masks_tokens else None
    nats, predicted = model.scorer.predictions(*arrays, tokens, places, hidden, last=scored.shape[1])
    right = (predicted == tokens[:, 1:]).sum(1, np.float64, where=scored)
    return Recall(nats.sum(1, np.float64, where=scored), right, scored.sum(1, np.float64))


def trace(model: ScoredModel, count: int, length: int) -> None:
    """Trace the program for this many samples of `length` read tokens, with abstract arrays."""
    options = {"masks_tokens": model.config.masks_tokens, "last": length}
    model.scorer.trace(*model[2:], count, length, _places(model.config, length, length), **options)


def _places(config: RunConfig, length: int, padded: int) -> Array | None:
    """The positions of `length` tokens, repeating the last one for padding, which no earlier token reads."""
    places = evaluation_positions(config, length)
    if places is None:
        return None
    return jnp.pad(places, [(0, 0)] * (places.ndim - 1) + [(0, padded - length)], mode="edge")
