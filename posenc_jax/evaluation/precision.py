"""The precision of positions, and a warning if the positions of a run exceed it.

Positions are int32, or float32 if they are not whole numbers. Angles and biases are computed from them in float32, for
every dtype of the model. Queries, keys and embeddings become bfloat16 only after rotation or addition, so the rounding
error that bfloat16 adds to a logit does not grow with the position. The error of float32 does grow. The product of a
position and a rate has a relative error of up to 2^-24, so an angle is off by up to position * rate * 2^-24 radians.
From 2^24 tokens on, neighbouring positions are the same float32 number.
"""

import logging

import numpy as np
from flax import nnx

from posenc_jax import encodings, positions
from posenc_jax.config import RunConfig, TransformerConfig
from posenc_jax.models.transformer import encoding_dims

ROUNDING = 2.0**-24  # relative rounding error of float32
MAX_RADIANS = 0.01  # allowed error of an angle; changes logits about as much as bfloat16 queries and keys do

log = logging.getLogger(__name__)


def warn(config: RunConfig) -> None:
    """Log one line if float32 is too coarse for the encoding's angles at the positions of the run."""
    if not isinstance(config.model, TransformerConfig):
        return
    field, value, count = farthest(config)
    rate = fastest_rate(config, config.model)
    allowed = int(min(MAX_RADIANS / max(rate, MAX_RADIANS), 1) / ROUNDING)
    if count > allowed:
        held = f"angles of up to {rate:g} radians per token to {count * rate * ROUNDING:.2g} radians"
        log.warning("%s = %s: float32 holds %s there; keep positions below %d", field, value, held, allowed)


def farthest(config: RunConfig) -> tuple[str, object, int]:
    """The setting that determines the largest position of the run, its value, and an upper bound of all positions."""
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
    """The highest inverse frequency of the encoding, in radians per token. 0 if it has none."""
    dims = encoding_dims(model, config.pretrained_reach)
    own = encodings.build(config.encoding.name, dims, nnx.Rngs(0), **vars(config.encoding.hyperparameters))
    rates = getattr(own, "inverse_frequencies", None)
    return 0.0 if rates is None else float(np.max(rates[...], initial=0))
