"""The precision of positions, and a warning if a run exceeds it.

Positions are int32 or, between whole numbers, float32; angles and biases are made of them in float32, whatever the
model's dtype. What becomes bfloat16 are queries, keys and embeddings once they are turned or added to, so that a logit
of a bfloat16 model is off by as much at any position. What remains is float32: a position times a rate is rounded to
within 2^-24 of itself, so that angles are off by up to position * rate * 2^-24 radians, and from 2^24 tokens on
neighbours are one number.
"""

import logging

import numpy as np
from flax import nnx

from posenc_jax import encodings, positions
from posenc_jax.config import RunConfig, TransformerConfig
from posenc_jax.models.transformer import encoding_dims

ROUNDING = 2.0**-24  # of float32, relative
MOST_RADIANS = 0.01  # of error in an angle, which is to logits about what bfloat16's rounding of queries and keys is

log = logging.getLogger(__name__)


def warn(config: RunConfig) -> None:
    """Log one line if float32 is too coarse for the encoding's angles at the positions of the run."""
    if not isinstance(config.model, TransformerConfig):
        return
    field, value, count = farthest(config)
    rate = fastest_rate(config, config.model)
    allowed = int(min(MOST_RADIANS / max(rate, MOST_RADIANS), 1) / ROUNDING)
    if count > allowed:
        held = f"angles of up to {rate:g} radians per token to {count * rate * ROUNDING:.2g} radians"
        log.warning("%s = %s: float32 holds %s there; keep positions below %d", field, value, held, allowed)


def farthest(config: RunConfig) -> tuple[str, object, int]:
    """The setting that gives the run's largest position, its value, and an upper bound of all positions."""
    lengths, schedule = config.evaluation.lengths, config.positions
    trained = schedule.reach(config.training.length)
    contiguous = schedule.evaluation != "interpolated" and not positions.depend_on_length(schedule)
    in_training = "config.training.length" if schedule.training == "contiguous" else "config.positions.range"
    found: list[tuple[str, object, int]] = [(in_training, trained, trained)]
    if schedule.evaluation == "even":
        found.append(("config.positions.range", schedule.range, schedule.range))
    if contiguous:
        found.append(("config.evaluation.lengths", lengths, lengths[-1]))
    return max(found, key=lambda item: item[2])


def fastest_rate(config: RunConfig, model: TransformerConfig) -> float:
    """The highest inverse frequency of the run's encoding, in radians per token; 0 if it has none."""
    dims = encoding_dims(model, config.pretrained_reach)
    own = encodings.build(config.encoding.name, dims, nnx.Rngs(0), **vars(config.encoding.hyperparameters))
    rates = getattr(own, "inverse_frequencies", None)
    return 0.0 if rates is None else float(np.max(rates[...], initial=0))
