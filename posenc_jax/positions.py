"""Position schedules: where tokens are placed, in training and in evaluation, under any encoding.

Every schedule gives increasing positions. Those that draw them do so for the whole batch at once, as a shape [1, T], or
once per layer, [layers, 1, T]. Positions 0 .. T-1 are None, as a model takes them: it then knows, when it is compiled,
that they step by one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Real

from posenc_jax.config import PositionsConfig


def in_training(
    config: PositionsConfig, length: int, num_layers: int, key: Array
) -> Real[Array, "1 T"] | Real[Array, "layers 1 T"] | None:
    """Positions of one training step.

    - `contiguous`: 0 .. T-1, given as None.
    - `offset`: the same from a random start, so that the last is below `range`. Kiyono et al. 2021 (SHAPE).
    - `randomized`: T whole numbers below `range`, without replacement, in order. Ruoss et al. 2023.
    - `random_float`: T real numbers in [0, range), in order. Shimizu et al. 2026 (Random Float Sampling).
    """
    if config.training == "contiguous":
        return None

    def draw(key):
        if config.training == "offset":
            return jnp.arange(length)[None] + jax.random.randint(key, (), 0, config.range - length + 1)
        if config.training == "randomized":
            return jnp.sort(jax.random.permutation(key, config.range)[:length])[None]
        return jnp.sort(jax.random.uniform(key, (1, length), maxval=config.range))

    return jax.vmap(draw)(jax.random.split(key, num_layers)) if config.per_layer else draw(key)


def in_evaluation(
    config: PositionsConfig, length: int, num_layers: int, training_length: int
) -> Real[Array, "1 T"] | Real[Array, "layers 1 T"] | None:
    """Positions of the T tokens of an evaluation window.

    - `contiguous`: 0 .. T-1, given as None.
    - `drawn`: as in training, always the same draw for one length. Ruoss et al. 2023 also do this.
    - `even`: evenly spaced from 0 to `range` - 1, about the average of many draws.
    - `interpolated`: past the training length, evenly spaced within it: position interpolation under any encoding.
    """
    if config.evaluation == "drawn":
        return in_training(config, length, num_layers, jax.random.key(0))
    if config.evaluation == "even":
        return jnp.linspace(0, config.range - 1, length)[None]
    if config.evaluation == "interpolated" and length > training_length:
        return jnp.linspace(0, training_length - 1, length)[None]
    return None


def depend_on_length(config: PositionsConfig) -> bool:
    """Whether a token's position in evaluation depends on how long the window is."""
    return config.evaluation != "contiguous" and (config.evaluation, config.training) != ("drawn", "contiguous")
